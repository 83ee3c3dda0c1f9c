"""A loaded model as its callers see it, and the worker process that holds the library."""
