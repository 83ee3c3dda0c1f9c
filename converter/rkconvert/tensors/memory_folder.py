"""A folder that exists only in memory: a GGUF file's settings and tokenizer, for readers that expect files.

Nothing of it is written anywhere, so a kill leaves nothing behind.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, Protocol

from rkruntime.files import open_regular


class Place(Protocol):
    """The part of a `Path` that readers of a model's small files use."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        ...

    @property
    def parent(self) -> Place:
        """The folder that contains it."""
        ...

    def __truediv__(self, name: str, /) -> Place:
        """Return the entry `name` of this folder."""
        ...

    def is_file(self) -> bool:
        """Whether it is an existing file."""
        ...

    def iterdir(self) -> Iterator[Place]:
        """Yield the entries of this folder."""
        ...

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Open for reading. Raises OSError."""
        ...

    def read_bytes(self) -> bytes:
        """Return the whole content. Raises OSError."""
        ...


def open_file(place: Place) -> BinaryIO:
    """Open an untrusted file for reading; every such file is opened here, or by `rkruntime.files` itself.

    Raises:
        OSError: The file cannot be read, or is not a regular file: a FIFO would block, and a device has no end.
    """
    return open_regular(place) if isinstance(place, Path) else place.open("rb")


class MemoryFolder:
    """Files in memory by name, or one of them.

    Args:
        origin: Path for messages, of the file from which everything was read.
    """

    def __init__(self, origin: Path, files: Mapping[str, bytes], within: PurePath | None = None) -> None:
        self._origin, self._files, self._within = origin, files, within or PurePath()

    def __str__(self) -> str:
        return f"{self.name} of {self._origin}" if self.name else str(self._origin)

    @property
    def name(self) -> str:
        """See `Place`."""
        return self._within.name

    @property
    def parent(self) -> MemoryFolder:
        """See `Place`."""
        return MemoryFolder(self._origin, self._files, self._within.parent)

    def __truediv__(self, name: str, /) -> MemoryFolder:
        return MemoryFolder(self._origin, self._files, self._within / name)

    def is_file(self) -> bool:
        """See `Place`."""
        return str(self._within) in self._files

    def iterdir(self) -> Iterator[MemoryFolder]:
        """See `Place`."""
        return (self / name for name in self._files)

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """See `Place`."""
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        """See `Place`."""
        try:
            return self._files[str(self._within)]
        except KeyError:
            raise FileNotFoundError(2, "No such file", str(self)) from None
