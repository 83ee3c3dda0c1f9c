"""Chats at a terminal, with a model on this machine or on a board."""
