"""Own photos to GSV-Cities' format."""
