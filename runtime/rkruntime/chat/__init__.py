"""Chats in a terminal, here and on a board."""
