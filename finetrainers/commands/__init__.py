"""One file, one verb; each reads as a recipe."""
