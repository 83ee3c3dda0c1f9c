"""What is wrong with a board: a probe that looks, checks that judge, and the safe repairs."""
