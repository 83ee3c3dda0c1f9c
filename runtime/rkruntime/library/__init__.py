"""librkllmrt.so: identify it and bind it."""
