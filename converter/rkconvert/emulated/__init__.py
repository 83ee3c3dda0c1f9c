"""The emulator's target: .rkemu files for models and adapters."""
