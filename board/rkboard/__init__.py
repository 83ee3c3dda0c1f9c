"""Tools for the device (doctor, clocks, top, bench, deploy, fleet), and the emulator that stands in for its NPU."""
