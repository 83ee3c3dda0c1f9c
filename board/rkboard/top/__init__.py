"""What a board does at the moment: once, or again and again on a screen."""
