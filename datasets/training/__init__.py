"""Places to train on: GSV-Cities, RandAugment, order by similarity."""
