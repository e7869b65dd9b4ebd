"""What each model says about itself: one file a family, found by folder name."""
