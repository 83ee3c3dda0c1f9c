"""Many boards: a file that names them, what is done on all of them, and one address in front of them."""
