"""`rkedge toolkit selftest`: whether an installation of the vendor's toolkit works, tried out with a tiny model."""
