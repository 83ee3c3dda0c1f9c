"""Host side: checkpoint -> bundle."""
