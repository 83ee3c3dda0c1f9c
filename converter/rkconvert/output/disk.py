"""Disk space, checked before the work rather than after it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from rkconvert.output.work_folder import kept_bytes
from rkruntime.errors import HostError
from rkruntime.files import write_error

# Bytes for the tokenizer, the reports and the file system's own needs.
_SPARE_BYTES: Final = 64 << 20


def require_space(output: Path, nbytes: int) -> None:
    """Raise HostError if the folder that will contain `output` does not have room for `nbytes`."""
    free = shutil.disk_usage(output.parent).free + kept_bytes(output)
    if nbytes + _SPARE_BYTES > free:
        raise HostError(
            f"{output} needs {_text(nbytes)}, and {_SPARE_BYTES >> 20} MiB more for its tokenizer and reports,"
            f" but {output.parent.resolve()} has {_text(free)} free.",
            hint="Free space there, or name an output folder on another disk.",
        )


@contextmanager
def spare(folder: Path) -> Iterator[None]:
    """Hold _SPARE_BYTES on the disk of `folder` during long work: afterwards there is room for the small files.

    Raises:
        HostError: There is less space.
        OutputError: Nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # without a name, also after a kill
            os.posix_fallocate(held.fileno(), 0, _SPARE_BYTES)
        except OSError as error:
            raise write_error(folder, error) from error
        yield


@contextmanager
def room_for(path: Path, nbytes: int) -> Iterator[Callable[[bytes], None]]:
    """Hold room for the small file that says that long work is done; what this yields writes that file.

    Other programs may fill the disk in the moment in which `spare` lets go of its room, and what they cannot take is
    the room of a file that is there already.

    Raises:
        HostError: There is no such room.
        OutputError: Nothing can be written there.
    """
    room = path.with_name(f".{path.name}.room")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            file = stack.enter_context(room.open("wb", buffering=0))
            stack.callback(room.unlink, missing_ok=True)
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise write_error(path, error) from error

        def write(data: bytes) -> None:
            os.pwrite(file.fileno(), data, 0)
            file.truncate(len(data))
            os.fsync(file.fileno())
            room.replace(path)

        yield write


def _text(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
