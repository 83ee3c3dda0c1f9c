"""Build the emulated librkllmrt.so."""
