"""Photos to train on (GSV-Cities) and to be judged by (database/queries trees)."""
