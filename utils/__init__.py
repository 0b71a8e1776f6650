"""Tools of the training and evaluation scripts; each module does one thing and knows nothing of the rest."""
