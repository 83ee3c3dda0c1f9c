"""The daemon: one model on the NPU, many clients, and no network access unless configured, with a key."""
