"""The header of a GGUF file, parsed with limits: it comes from strangers and says how much of everything follows.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from rkconvert.tensors.shards import refuse_lfs_pointer
from rkruntime.errors import CheckpointError

T = TypeVar("T")
MAGIC: Final = b"GGUF"
# Gemma's header has 14 MB (a quarter of a million token texts) and some 300 to 600 tensors.
_MAX_HEADER: Final = 256 << 20
_MAX_COUNT: Final = 1 << 20
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the directory.

    Attributes:
        shape: outermost dimension first.
        kind: its type, as ggml numbers it.
        offset: from the beginning of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """What a file's header says."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    size: int


class _Reader:
    """Takes values from the header; CheckpointError past its end or its limit."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._left = _MAX_HEADER

    def bytes(self, size: int) -> bytes:
        self._left -= size
        data = self._file.read(size) if self._left >= 0 else b""
        if len(data) < size:
            raise CheckpointError(f"{self._path} is cut or damaged: its header ends early or claims too much.")
        return data

    def number(self, form: str) -> Any:
        layout = struct.Struct("<" + form)
        return layout.unpack(self.bytes(layout.size))[0]

    def count(self, what: str) -> int:
        found = int(self.number("Q"))
        if found > _MAX_COUNT:
            raise CheckpointError(f"{self._path} is damaged: its header claims {found:,} {what}.")
        return found

    def text(self) -> str:
        return self.bytes(int(self.number("Q"))).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._array(int(self.number("I")))
        raise CheckpointError(f"{self._path} is damaged: a value of its header has the unknown type {kind}.")

    def _array(self, kind: int) -> list[Any]:
        count = self.count("values in an array")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path} is damaged: an array of its header has the unknown type {kind}.")
        layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return list(layout.unpack(self.bytes(layout.size)))


def read_gguf(path: Path) -> GgufFile:
    """Parse a file's header. Raises CheckpointError if it is not a GGUF file, or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
            refuse_lfs_pointer(path, head, CheckpointError)
            if head[:4] != MAGIC:
                raise CheckpointError(
                    f"{path} is not a GGUF file: its first bytes are {head[:4].hex(' ') or 'missing'}."
                )
            file.seek(4)
            return _parse(path, size, _Reader(path, file), file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _parse(path: Path, size: int, reader: _Reader, file: BinaryIO) -> GgufFile:
    version = reader.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, can be read.")
    tensor_count, value_count = reader.count("tensors"), reader.count("values")
    metadata = _table(path, "key", [(reader.text(), reader.value(int(reader.number("I")))) for _ in range(value_count)])
    directory = _table(path, "tensor", [_entry(path, reader) for _ in range(tensor_count)])
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{path} is damaged: its alignment is {alignment!r}.")
    data = -(-file.tell() // alignment) * alignment
    tensors = {name: replace(tensor, offset=data + tensor.offset) for name, tensor in directory.items()}
    return GgufFile(path, metadata, tensors, size)


def _table(path: Path, what: str, pairs: list[tuple[str, T]]) -> dict[str, T]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise CheckpointError(f"{path} is damaged: its header has the {what} {twice[:80]!r} twice.")
    return found


def _entry(path: Path, reader: _Reader) -> tuple[str, GgufTensor]:
    name, rank = reader.text(), int(reader.number("I"))
    if not 0 < rank <= 4:
        raise CheckpointError(f"{path} is damaged: its tensor {name!r} has {rank} dimensions.")
    shape = tuple(int(reader.number("Q")) for _ in range(rank))[::-1]
    if math.prod(shape) > 1 << 40:
        raise CheckpointError(f"{path} is damaged: its tensor {name!r} has the shape {list(shape)}.")
    return name, GgufTensor(shape, int(reader.number("I")), int(reader.number("Q")))
