"""Text to token ids and back: tokenizer, template, conversation, answer."""
