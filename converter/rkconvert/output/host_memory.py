"""Memory of this machine with its swap, which a conversion can use, though a board's NPU cannot."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rkruntime.checks import machine
from rkruntime.errors import HostError


@dataclass(frozen=True)
class HostMemory:
    """Memory in bytes.

    Attributes:
        ram, swap: This machine's totals, or a container's limit if that is lower.
        available: RAM that a program can get without swapping.
    """

    ram: int
    swap: int
    available: int

    @property
    def total(self) -> int:
        """RAM and swap."""
        return self.ram + self.swap

    def __str__(self) -> str:
        return f"{self.ram / 1e9:.1f} GB of RAM and {self.swap / 1e9:.1f} GB of swap"


def read_memory(root: Path = machine.ROOT) -> HostMemory:
    """Read /proc/meminfo and the container's limits. Raises HostError if it cannot."""
    found = machine.memory(root)
    if found is None:
        raise HostError("The size of this machine's memory cannot be read.", hint="Mount /proc and try again.")
    match = re.search(r"^SwapTotal:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    swap = int(match[1]) * 1024 if match else 0
    with suppress(OSError, ValueError):  # the container's limit (cgroup v2); "max" for none
        swap = min(swap, int((root / "sys/fs/cgroup/memory.swap.max").read_text()))
    return HostMemory(found.total, swap, found.available)
