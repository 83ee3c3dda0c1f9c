"""A conversion from its options to its bundle; recipes and matrices of them."""
