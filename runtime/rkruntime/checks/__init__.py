"""The machine, what is known to fail on it, and what its logs mean."""
