"""How the bundled model was made, from rendered clips and random weights."""
