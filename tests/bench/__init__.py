"""Speed and memory, beside others in one run; `make bench` runs each module here without an underscore."""
