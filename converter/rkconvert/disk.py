"""Room on the disk, asked for before the work and not found out after it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from rkruntime.errors import HostError

# For tokenizer, reports and the file system's own needs.
_SPARE_BYTES: Final = 64 << 20


def require_space(output: Path, nbytes: int) -> None:
    """Raise HostError if there is no room for `nbytes` in the folder that `output` will be made in."""
    needed, free = nbytes + _SPARE_BYTES, shutil.disk_usage(output.parent).free
    if needed > free:
        raise HostError(
            f"{output} needs {needed / 1e9:.2f} GB, and {output.parent.resolve()} has {free / 1e9:.2f} GB free.",
            hint="Free space there, or name an output folder on another disk.",
        )
