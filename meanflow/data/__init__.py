"""Data: where samples come from, and which of them each process gets at each step."""
