"""Models in other forms than a plain Hugging Face folder."""
