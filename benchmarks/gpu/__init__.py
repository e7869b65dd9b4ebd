"""Runs of full-size models with random weights on one GPU: speed, memory, and whether what was planned holds."""
