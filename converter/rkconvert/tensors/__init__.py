"""Tensors in files: formats, readers, and the state of files that were read."""
