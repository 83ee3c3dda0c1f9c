"""The rkedge of a board that is this machine: with a boot that a test can end, and a slow disk.

Run as `python standin.py BOOT PAUSE_MS visit ...`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rkruntime import cli
from rkruntime.checks import machine
from rkruntime.visit import place


class Slow:
    """A stream that takes time for each block."""

    def __init__(self, stream: Any, pause: float) -> None:
        self._stream, self._pause = stream, pause

    def read(self, size: int) -> bytes:
        time.sleep(self._pause)
        data: bytes = self._stream.read(size)
        return data


def main() -> int:
    boot, pause = Path(sys.argv[1]), int(sys.argv[2]) / 1000
    receive = place.Place.receive
    machine.boot_id = lambda: boot.read_text().strip()  # type: ignore[assignment]
    place._BLOCK = 1 << 15
    place.Place.receive = lambda self, name, offset, stream: receive(self, name, offset, Slow(stream, pause))  # type: ignore
    return cli.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
