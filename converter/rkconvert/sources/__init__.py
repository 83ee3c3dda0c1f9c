"""Models in forms other than a plain Hugging Face folder."""
