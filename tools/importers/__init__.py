"""Formats of other code bases, one file each, for tools/convert.py."""
