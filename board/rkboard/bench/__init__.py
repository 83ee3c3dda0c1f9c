"""The speed of a bundle: what is measured, what the board did meanwhile, and what was to be expected."""
