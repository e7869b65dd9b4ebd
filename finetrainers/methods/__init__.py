"""Which weights move: one file a method, found by folder name."""
