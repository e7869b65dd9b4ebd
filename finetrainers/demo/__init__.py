"""A tiny model and rendered clips, so that everything can be tried offline on a CPU."""
