"""Where tools/launch.py starts runs."""
