"""Many boards: a file that names them, work on all of them, and one address in front of them."""
