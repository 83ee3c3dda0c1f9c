"""Builds the stand-in for librkllmrt.so."""
