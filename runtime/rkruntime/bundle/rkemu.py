"""The emulator's model container, `.rkemu`, as described in docs/rkemu-format.md: a streaming writer and a reader.

The engine in board/emulator maps the same bytes; nothing here loads a whole model.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from rkruntime.errors import ModelFileError
from rkruntime.files import open_regular, set_aside
from rkruntime.words import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Value = int | float | str | Sequence[int]

MAGIC: Final = b"RKEMU\r\n\x1a"
VERSION: Final = 1
SIZES_ONLY: Final = 1
PAGE: Final = 4096
ALIGNMENT: Final = 64
# Limit of metadata and directory in bytes, ample as 27B has 600 tensors and a tokenizer is a tensor of its own.
MAX_SECTION: Final = 64 << 20

_HEADER = struct.Struct("<8sIIQQQQIIII")
_DTYPES: Final = ("float32", "int8", "uint8", "uint32")
_ITEMSIZE: Final = {"float32": 4, "int8": 1, "uint8": 1, "uint32": 4}
_INT, _FLOAT, _TEXT, _INTS = 1, 2, 3, 4


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in the directory: `dtype` is numpy's name, `shape` starts with the outermost dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        size = _ITEMSIZE[self.dtype]
        for dimension in self.shape:
            size *= dimension
        return size


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: the offset of its data from the beginning of the file, and its CRC-32."""

    spec: TensorSpec
    offset: int
    crc32: int


def _align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def _pack_value(value: Value) -> bytes:
    if isinstance(value, int):
        return struct.pack("<Bq", _INT, value)
    if isinstance(value, float):
        return struct.pack("<Bd", _FLOAT, value)
    if isinstance(value, str):
        text = value.encode()
        return struct.pack("<BQ", _TEXT, len(text)) + text
    return struct.pack(f"<BQ{len(value)}q", _INTS, len(value), *value)


def _pack_metadata(metadata: Mapping[str, Value]) -> bytes:
    return b"".join(
        struct.pack("<H", len(key.encode())) + key.encode() + _pack_value(value) for key, value in metadata.items()
    )


def _pack_entry(spec: TensorSpec, offset: int, crc32: int) -> bytes:
    name = spec.name.encode()
    return (
        struct.pack("<H", len(name))
        + name
        + struct.pack(f"<BB{len(spec.shape)}Q", _DTYPES.index(spec.dtype), len(spec.shape), *spec.shape)
        + struct.pack("<QQI", offset, spec.nbytes, crc32)
    )


class Writer:
    """Write a container tensor by tensor, in any order, with at most one in memory.

    Args:
        path: File to create or overwrite.
        metadata: Keys and values of docs/rkemu-format.md; bool is not allowed.
        tensors: The whole directory, in the order of the data.
        sizes_only: Leave out the data (for tests of the memory plan).

    As a context manager it removes the file if the block raises, and refuses to finish while a tensor is missing.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Value],
        tensors: Sequence[TensorSpec],
        *,
        sizes_only: bool = False,
    ) -> None:
        if len({spec.name for spec in tensors}) != len(tensors):
            raise ValueError("two tensors in the directory have the same name")
        self.path = path
        self._metadata = _pack_metadata(metadata)
        self._metadata_count = len(metadata)
        self._specs = {spec.name: spec for spec in tensors}
        self._offsets: dict[str, int] = {}
        self._crcs: dict[str, int] = dict.fromkeys(self._specs, 0) if sizes_only else {}
        self._sizes_only = sizes_only
        end = 0
        for spec in tensors:
            self._offsets[spec.name] = _align(end, ALIGNMENT)
            end = self._offsets[spec.name] + spec.nbytes
        self._data_offset = _align(_HEADER.size + len(self._metadata) + len(self._directory()), PAGE)
        self._file_size = self._data_offset + (0 if sizes_only else end)
        self._file = path.open("wb", buffering=0)
        set_aside(self._file.fileno(), self._file_size)

    def _directory(self) -> bytes:
        return b"".join(
            _pack_entry(spec, self._offsets[name], self._crcs.get(name, 0)) for name, spec in self._specs.items()
        )

    def write(self, name: str, array: NDArray[np.generic]) -> None:
        """Write one whole tensor. Raises ValueError if its dtype or shape differs from the directory's."""
        self.write_rows(name, 0, array)

    def write_rows(self, name: str, first_row: int, array: NDArray[np.generic]) -> None:
        """Write a tensor's next rows; blocks of a tensor must come in order, but may alternate with other tensors'.

        A forked process may do this for a tensor; `checksums` is then what the one that closes the file needs.
        """
        import numpy as np

        spec = self._specs[name]
        rows = array.shape[0] if array.ndim else 1
        if array.dtype.name != spec.dtype or array.shape[1:] != spec.shape[1:] or first_row + rows > spec.shape[0]:
            raise ValueError(f"{name}: {array.dtype}{list(array.shape)} at row {first_row} does not fit {spec}")
        data = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        self._put(data, self._data_offset + self._offsets[name] + first_row * row_bytes)
        self._crcs[name] = zlib.crc32(data, self._crcs.get(name, 0))

    def _put(self, data: memoryview | bytes, offset: int) -> None:
        # Not seek and write: forked processes share the place in the file.
        while data:
            done = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[done:], offset + done

    def checksums(self, names: Iterable[str]) -> dict[str, int]:
        """Return the CRC-32 of these tensors, as written so far."""
        return {name: self._crcs[name] for name in names}

    def written(self, checksums: Mapping[str, int]) -> None:
        """Note that another process wrote whole tensors, with these CRC-32."""
        self._crcs.update(checksums)

    def close(self) -> None:
        """Write header and directory. Raises ValueError if a tensor has no data."""
        missing = [name for name in self._specs if name not in self._crcs]
        if missing:
            raise ValueError(f"no data for {len(missing)} tensors, including {missing[0]}")
        sections = self._metadata + self._directory()
        head = _HEADER.pack(
            MAGIC,
            VERSION,
            SIZES_ONLY if self._sizes_only else 0,
            self._file_size,
            len(self._metadata),
            len(sections) - len(self._metadata),
            self._data_offset,
            len(self._specs),
            self._metadata_count,
            zlib.crc32(sections),
            0,
        )[:-4]
        self._file.truncate(self._file_size)
        self._put(head + struct.pack("<I", zlib.crc32(head)) + sections, 0)
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not self._file.closed:
                self._file.close()
                self.path.unlink(missing_ok=True)


class _Cursor:
    """Read the fields of a section; raises ModelFileError past its end."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.what, self.at = data, what, 0

    def take(self, form: str) -> tuple[int | float, ...]:
        layout = struct.Struct("<" + form)
        return layout.unpack(self.bytes(layout.size))

    def integer(self, form: str) -> int:
        return int(self.take(form)[0])

    def bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ModelFileError(f"The {self.what} of this .rkemu file ends in the middle of an entry.")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self, size: int) -> str:
        try:
            return self.bytes(size).decode()
        except UnicodeDecodeError as error:
            raise ModelFileError(f"A string in the {self.what} of this .rkemu file is not UTF-8.") from error


def _read_value(cursor: _Cursor) -> Value:
    kind = cursor.integer("B")
    if kind == _INT:
        return cursor.integer("q")
    if kind == _FLOAT:
        return float(cursor.take("d")[0])
    if kind == _TEXT:
        return cursor.text(cursor.integer("Q"))
    if kind == _INTS:
        count = cursor.integer("Q")
        return list(struct.unpack(f"<{count}q", cursor.bytes(count * 8)))
    raise ModelFileError(f"This .rkemu file has a metadata value of unknown type {kind}.")


def _read_entry(cursor: _Cursor, data_offset: int) -> TensorEntry:
    name = cursor.text(cursor.integer("H"))
    dtype, rank = cursor.integer("B"), cursor.integer("B")
    if dtype >= len(_DTYPES) or rank > 4:
        raise ModelFileError(f"The tensor {name} of this .rkemu file has an unknown type ({dtype}) or rank ({rank}).")
    shape = tuple(int(dimension) for dimension in cursor.take(f"{rank}Q"))
    spec = TensorSpec(name, _DTYPES[dtype], shape)
    offset, size, crc32 = (int(number) for number in cursor.take("QQI"))
    if size != spec.nbytes or offset % ALIGNMENT:
        raise ModelFileError(f"The size of the tensor {name} in this .rkemu file does not match its shape.")
    return TensorEntry(spec, data_offset + offset, crc32)


@dataclass(frozen=True)
class Container:
    """The header, metadata and directory of a file.

    Attributes:
        metadata: Keys of docs/rkemu-format.md.
        tensors: Tensors by name.
        fingerprint: CRC-32 of metadata and directory, 8 hex digits: equal for equal weights.
        file_size: Size in bytes.
        sizes_only: Whether the file has no tensor data.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorEntry]
    fingerprint: str
    file_size: int
    sizes_only: bool

    def read(self, name: str) -> NDArray[np.generic]:
        """Read one tensor's data. Raises ModelFileError if the checksum does not match."""
        import numpy as np

        entry = self.tensors[name]
        with open_regular(self.path) as file:
            file.seek(entry.offset)
            data = file.read(entry.spec.nbytes)
        if zlib.crc32(data) != entry.crc32:
            raise ModelFileError(f"The checksum of tensor {name} in {self.path} does not match: the file is damaged.")
        array: NDArray[np.generic] = np.frombuffer(data, entry.spec.dtype).reshape(entry.spec.shape)
        return array


def read_container(path: Path) -> Container:
    """Read header, metadata and directory of a `.rkemu` file.

    Raises:
        ModelFileError: Another kind of file, another version, truncated, or damaged.
    """
    with open_regular(path) as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise ModelFileError(f"{path} is not a .rkemu file: its first bytes are {head[:8].hex(' ') or 'missing'}.")
        (_, version, flags, file_size, metadata_size, directory_size, data_offset, tensor_count, metadata_count,
         sections_crc, head_crc) = _HEADER.unpack(head)  # fmt: skip
        if zlib.crc32(head[:-4]) != head_crc:
            raise ModelFileError(f"The header checksum of {path} does not match: the file is damaged.")
        if version != VERSION:
            raise ModelFileError(f"{path} has format version {version}; this release reads {VERSION}.")
        actual = path.stat().st_size
        if actual != file_size:
            raise ModelFileError(
                f"{path} has {counted(actual, 'byte')} but should have {file_size:,}: it is truncated or too long."
            )
        if max(metadata_size, directory_size) > MAX_SECTION:
            raise ModelFileError(f"{path} has a metadata or directory section larger than {MAX_SECTION >> 20} MiB.")
        sections = file.read(metadata_size + directory_size)
    if zlib.crc32(sections) != sections_crc:
        raise ModelFileError(f"The metadata and directory checksum of {path} does not match: the file is damaged.")
    cursor = _Cursor(sections[:metadata_size], "metadata")
    metadata = {cursor.text(cursor.integer("H")): _read_value(cursor) for _ in range(metadata_count)}
    cursor = _Cursor(sections[metadata_size:], "directory")
    entries = [_read_entry(cursor, data_offset) for _ in range(tensor_count)]
    return Container(
        path=path,
        metadata=metadata,
        tensors={entry.spec.name: entry for entry in entries},
        fingerprint=f"{sections_crc:08x}",
        file_size=file_size,
        sizes_only=bool(flags & SIZES_ONLY),
    )
