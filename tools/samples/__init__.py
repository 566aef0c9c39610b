"""Parts of tools/sample.py."""
