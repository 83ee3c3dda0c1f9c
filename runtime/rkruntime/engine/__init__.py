"""A loaded model, seen from outside, and the worker process that holds the library."""
