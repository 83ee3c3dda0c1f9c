"""The device itself and its stand-in: emulator, doctor, clocks, deploy."""
