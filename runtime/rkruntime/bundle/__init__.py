"""A bundle's manifest and its model files."""
