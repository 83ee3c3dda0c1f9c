"""Conversion with the vendor's rkllm-toolkit, under its own Python interpreter; it is never imported here."""
