"""Speed and memory, measured as ratios side by side in one run; `make bench` runs each module here in turn."""
