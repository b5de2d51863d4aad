"""Speed of a stage's programs on random parameters and tokens."""
