"""Parse the header of a GGUF file, with limits: the file is untrusted and states all counts itself.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from rkconvert.tensors.shards import refuse_lfs_pointer
from rkruntime.errors import CheckpointError
from rkruntime.files import open_regular, read_error
from rkruntime.words import counted

T = TypeVar("T")
MAGIC: Final = b"GGUF"
# Limits on a header's bytes and on each count. Gemma's has 14 MB (250,000 token texts) and some 300 to 600 tensors.
_MAX_HEADER: Final = 256 << 20
_MAX_COUNT: Final = 1 << 20
# Limit on values in all arrays of a header, some 40 bytes of memory each. Gemma's has three for each of its tokens.
_MAX_VALUES: Final = 1 << 23
_MAX_PARTS: Final = 99_999
_WHOLE_MODEL: Final = "Download all parts of the model again."
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the directory.

    Attributes:
        shape: Outermost dimension first.
        kind: Its type, by ggml's number.
        offset: Bytes from the start of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """Contents of a file's header."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    size: int


class _GgufReader:
    """Reads values from the header; raises CheckpointError past its end or its limit."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._left, self._values = _MAX_HEADER, _MAX_VALUES

    def bytes(self, size: int) -> bytes:
        self._left -= size
        data = self._file.read(size) if self._left >= 0 else b""
        if len(data) < size:
            raise CheckpointError(f"{self._path} is cut or damaged: its header ends early or claims too large a size.")
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
        self._values -= count
        if self._values < 0:
            raise CheckpointError(f"{self._path} is damaged: its header has more than {_MAX_VALUES:,} values.")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path} is damaged: an array of its header has the unknown type {kind}.")
        layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return list(layout.unpack(self.bytes(layout.size)))


def read_gguf(path: Path) -> GgufFile:
    """Parse a file's header. Raises CheckpointError if it is not a GGUF file, or is damaged."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            head = file.read(64)
            refuse_lfs_pointer(path, head, CheckpointError)
            if head[:4] != MAGIC:
                raise CheckpointError(
                    f"{path} is not a GGUF file: its first bytes are {head[:4].hex(' ') or 'missing'}."
                )
            file.seek(4)
            return _parse(path, size, _GgufReader(path, file), file)
    except OSError as error:
        raise read_error(path, error, CheckpointError) from error


def part_paths(path: Path, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the files of a model split by llama-gguf-split, from the first one's header; else the path alone.

    The rules are llama.cpp's (src/llama-model-loader.cpp): the user names the first file, it has all of the metadata,
    and the others are found by the pattern of its name, NAME-00001-of-0000N.gguf.

    Raises:
        CheckpointError: This is not the first part, a part is missing, or the name does not match the pattern.
    """
    count, number = (_split_value(path, metadata, key) for key in ("split.count", "split.no"))
    if count <= 1:
        return (path,)
    end = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not path.name.endswith(end) or len(path.name) == len(end):
        raise CheckpointError(
            f"{path} says that it is part {number + 1} of {count}, but its name does not end with {end}.",
            hint="Restore the parts' original names, or join them: llama-gguf-split --merge.",
        )
    name = path.name.removesuffix(end)
    paths = tuple(path.with_name(f"{name}-{at + 1:05d}-of-{count:05d}.gguf") for at in range(count))
    if number:
        raise CheckpointError(
            f"{path} is part {number + 1} of {count} of a model.", hint=f"Name its first part: {paths[0]}"
        )
    if missing := [part for part in paths if not part.is_file()]:
        raise CheckpointError(
            f"{path} is the first of {count} parts, but {missing[0].name} is not beside it.",
            hint="Download the missing part into the same folder.",
        )
    return paths


def _split_value(path: Path, metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    if type(value) is not int or not 0 <= value <= _MAX_PARTS:
        raise CheckpointError(f"{path} is damaged: {key} is {str(value)[:40]}.")
    return value


def read_parts(first: GgufFile, paths: Sequence[Path]) -> tuple[GgufFile, ...]:
    """Read the headers of all parts after the first.

    Raises:
        CheckpointError: A part belongs to another model or to another position; or their tensors are not the whole
            model's.
    """
    files = (first, *(read_gguf(path) for path in paths[1:]))
    for at, file in enumerate(files[1:], 1):
        for key, value in file.metadata.items():
            expected = at if key == "split.no" else first.metadata.get(key)
            if value != expected:
                raise CheckpointError(
                    f"{file.path} is not part {at + 1} of the model that {first.path.name} belongs to: its {key} is"
                    f" {str(value)[:40]}, not {str(expected)[:40]}.",
                    hint="Download the parts of one model into a separate folder.",
                )
        if "split.no" not in file.metadata or "split.count" not in file.metadata:
            raise CheckpointError(f"{file.path} does not say that it is a part of a model.", hint=_WHOLE_MODEL)
    names = Counter(name for file in files for name in file.tensors)
    [(most, times)] = names.most_common(1) or [("", 0)]
    if times > 1:
        raise CheckpointError(f"The tensor {most[:80]} is in {times} parts of {first.path}.", hint=_WHOLE_MODEL)
    total = first.metadata.get("split.tensors.count")
    if len(files) > 1 and total != len(names):
        raise CheckpointError(
            f"The parts of {first.path} have {counted(len(names), 'tensor')}; the first part says {str(total)[:40]}.",
            hint=_WHOLE_MODEL,
        )
    return files


def _parse(path: Path, size: int, reader: _GgufReader, file: BinaryIO) -> GgufFile:
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


def _entry(path: Path, reader: _GgufReader) -> tuple[str, GgufTensor]:
    name, rank = reader.text(), int(reader.number("I"))
    if not 0 < rank <= 4:
        raise CheckpointError(f"{path} is damaged: its tensor {name!r} has {rank} dimensions.")
    shape = tuple(int(reader.number("Q")) for _ in range(rank))[::-1]
    if math.prod(shape) > 1 << 40:
        raise CheckpointError(f"{path} is damaged: its tensor {name!r} has the shape {list(shape)}.")
    return name, GgufTensor(shape, int(reader.number("I")), int(reader.number("Q")))
