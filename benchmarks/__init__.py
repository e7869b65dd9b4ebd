"""What is measured of finetrainers, each script by itself; README.md tells how."""
