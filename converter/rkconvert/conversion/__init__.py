"""A conversion from options to bundle; recipes and matrices of conversions."""
