"""The loop and what hangs on it; knows no file format and no family by name."""
