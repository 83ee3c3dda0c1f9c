"""LoRA adapters: config, reader, updates, and the model they are merged into."""
