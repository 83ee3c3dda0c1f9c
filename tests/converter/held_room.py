"""Room on a disk that this process holds without a name."""

from __future__ import annotations

import stat
from pathlib import Path

ROOM = 64 << 20


def held() -> int:
    """Bytes on disks that only an open descriptor of this process keeps."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            found = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode) and not found.st_nlink:
            total += found.st_blocks * 512
    return total
