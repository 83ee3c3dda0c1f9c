"""The process in which librkllmrt.so lives: it may crash, hang or print, and the parent lives on."""
