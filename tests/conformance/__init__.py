"""Programs of other people, unmodified, against the emulator: `make conformance`, described in docs/emulator.md."""
