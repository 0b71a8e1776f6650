"""What measures speed and memory; see README.md for the figures."""
