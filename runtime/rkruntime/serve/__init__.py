"""The daemon: one model on the NPU, many clients, nothing open to a network unless it is asked for with a key."""
