"""The place of a bundle that is tried out on a board: a folder of its own, of which nothing stays."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from rkruntime.bundle.manifest import MANIFEST, Bundle, open_bundle
from rkruntime.errors import BundleError, BusyError, OutputError, UsageError
from rkruntime.files import write_error
from rkruntime.folders import own_folder

_ID: Final = re.compile(r"[0-9a-f]{16}")
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
# Most parts of a file's path within a bundle.
_MOST_PARTS: Final = 4
_BLOCK: Final = 1 << 20
# Seconds to wait for the process of a broken connection to end.
_PATIENCE_S: Final = 120.0
_LOOK_S: Final = 0.2


@dataclass(frozen=True)
class Place:
    """The folder of a visit.

    Raises:
        UsageError: `id` is not a valid id.
    """

    id: str

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise UsageError("The id of a visit has 16 hexadecimal digits.")

    @property
    def folder(self) -> Path:
        """The folder with everything that belongs to the visit."""
        return own_folder("cache") / "visits" / self.id

    @property
    def bundle(self) -> Path:
        """The folder of the bundle that was sent."""
        return self.folder / "bundle"

    @property
    def temporary(self) -> Path:
        """The folder for temporary files of the library and of probes, so that a crash leaves none elsewhere."""
        return self.folder / "tmp"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder, and keep other processes of this visit out of it.

        Raises:
            BusyError: Another process has not ended within two minutes.
            OutputError, HostError: The folder cannot be made.
        """
        try:
            for folder in (self.bundle, self.temporary):
                folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise write_error(self.folder, error) from error
        try:
            _lock(handle)
            yield
        finally:
            os.close(handle)

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files that are there, complete or not, by their names in the bundle."""
        return {
            path.relative_to(self.bundle).as_posix(): path.stat().st_size
            for path in sorted(self.bundle.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }

    def receive(self, name: str, offset: int, stream: BinaryIO) -> int:
        """Write a stream's data to a file from `offset` on; returns the file's size.

        Raises:
            UsageError: A bundle's file cannot have that name, or the file is shorter than `offset`.
            OutputError, HostError: The file cannot be written.
        """
        path = self._within(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if offset > (path.stat().st_size if path.exists() else 0):
                raise UsageError(f"{name} has fewer than {offset:,} bytes here.")
            with path.open("r+b" if path.exists() else "wb") as file:
                file.truncate(offset)
                file.seek(offset)
                while block := stream.read(_BLOCK):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise write_error(path, error) from error

    def _within(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not 1 <= len(parts) <= _MOST_PARTS or not all(map(_NAME.fullmatch, parts)) or "/".join(parts) != name:
            raise UsageError(f"{name[:80]!r} is not the name of a file in a bundle.")
        return self.bundle.joinpath(*parts)

    def wrong(self) -> list[str]:
        """Return the names of files that are missing or differ from the manifest, and remove those that differ.

        Every file is read, as after a crash a file may have the right size without its content.
        """
        try:
            bundle = open_bundle(self.bundle)
        except BundleError:
            (self.bundle / MANIFEST).unlink(missing_ok=True)
            return [MANIFEST]
        found = []
        for name in bundle.manifest.files:
            try:
                bundle.verify([name], trust_stamps=False)
            except BundleError:  # noqa: PERF203 - each file is judged
                found.append(name)
                (self.bundle / name).unlink(missing_ok=True)
        return found

    def open(self) -> Bundle:
        """Open the bundle. Raises BundleError."""
        return open_bundle(self.bundle)

    def remove(self) -> None:
        """Remove the whole folder. Raises OutputError if something stays."""
        with suppress(BundleError):
            self.open().forget()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise OutputError(f"{self.folder} could not be removed.", hint=f"On the board: rm -r {self.folder}")
        with suppress(OSError):  # there are other visits, or the folder is gone already
            self.folder.parent.rmdir()


def _lock(handle: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # noqa: PERF203 - the loop is there to try again
            if time.monotonic() > deadline:
                raise BusyError(
                    "Another process still works on this visit.",
                    hint="Wait until it has ended: pgrep -af 'rkedge visit'",
                ) from None
            time.sleep(_LOOK_S)
        else:
            return
