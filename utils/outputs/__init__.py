"""What an evaluation writes to look at, and for other programs."""
