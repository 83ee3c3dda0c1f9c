"""What a board does at the moment: read again and again, on a screen or once."""
