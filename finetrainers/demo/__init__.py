"""A small model that works and rendered clips to teach it with, so that everything can be tried offline on a CPU."""
