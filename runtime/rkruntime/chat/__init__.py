"""Terminal chats with a model here or on a board."""
