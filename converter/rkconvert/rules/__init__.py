"""What works where: quantized types, the toolkit's releases, context lengths."""
