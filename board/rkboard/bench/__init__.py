"""The speed of a bundle: the measurement, the state of the board meanwhile, and the speed that was expected."""
