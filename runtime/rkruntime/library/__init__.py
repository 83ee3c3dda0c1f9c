"""Identify and bind librkllmrt.so."""
