"""The daemon's interfaces: OpenAI's, Ollama's and its own."""
