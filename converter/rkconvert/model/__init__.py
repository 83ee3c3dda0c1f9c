"""A model's family, shapes and sizes, its tokenizer and its chat template."""
