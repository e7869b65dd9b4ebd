"""What training with each choice of options learns, on the bundled model."""
