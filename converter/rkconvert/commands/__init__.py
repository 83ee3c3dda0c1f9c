"""One module per command: `run` is the click command that `rkedge` imports on demand."""
