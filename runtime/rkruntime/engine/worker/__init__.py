"""The process in which librkllmrt.so lives: it may crash, hang or print without harm to the parent."""
