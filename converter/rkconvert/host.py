"""The memory of this machine, or of the container that it looks like one from inside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Limits of control groups, version 2 and 1, as a container sees its own; a limit beyond the RAM is none.
_LIMITS: Final = ("memory.max", "memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Memory:
    """In bytes.

    Attributes:
        ram: of the machine, or the container's limit if that is less.
        swap: of the machine.
        available: RAM that a program can get without swapping.
        limited: a container's limit is in force.
    """

    ram: int
    swap: int
    available: int
    limited: bool

    @property
    def total(self) -> int:
        """RAM and swap."""
        return self.ram + self.swap

    def __str__(self) -> str:
        where = ", by the limit of this container," if self.limited else ""
        return f"{self.ram / 1e9:.1f} GB of RAM{where} and {self.swap / 1e9:.1f} GB of swap"


def read_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """As /proc/meminfo and the control group say it."""
    fields = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    ram = fields["MemTotal"]
    limit = min([ram, *filter(None, (_read_limit(cgroup / name) for name in _LIMITS))])
    return Memory(limit, fields["SwapTotal"], min(fields["MemAvailable"], limit), limit < ram)


def _read_limit(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # no such file, or the word "max"
