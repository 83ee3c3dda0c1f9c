"""The daemon: one model on the NPU, many clients, nothing open to a network unless configured, with a key."""
