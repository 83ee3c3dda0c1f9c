"""Tensors in files: formats, readers, and what was read."""
