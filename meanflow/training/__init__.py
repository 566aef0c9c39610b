"""A run: its checks, its loop, its checkpoints and its log."""
