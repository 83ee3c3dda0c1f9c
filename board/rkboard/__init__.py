"""The device itself, and the emulator that replaces it: emulator, doctor, clocks, deploy."""
