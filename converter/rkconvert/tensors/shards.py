"""Safetensors files: the header is parsed and checked here; data is read with pread, block by block.

The format: 8 bytes header length, a JSON header, the data (https://github.com/huggingface/safetensors#format). The
files are not mapped into memory, as the safetensors library maps them, so that data that was read does not count as
memory of the process; and a hostile header is refused with the place of its fault.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.tensors.formats import STORAGE
from rkconvert.tensors.inputs import FileState, changed
from rkconvert.tensors.memory_folder import Place, open_file
from rkconvert.tensors.weights import TensorInfo
from rkruntime.errors import InputError
from rkruntime.files import read_error
from rkruntime.printable import printable, well_formed

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Limit in bytes. The format allows 100 MB, which take ten times as much in memory; the header of a 27B model has 60 kB.
MAX_HEADER: Final = 16 << 20
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_LFS: Final = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Entry:
    """Location of a tensor's bytes in a shard."""

    info: TensorInfo
    offset: int


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file's first bytes are those of a Git LFS pointer."""
    return head.startswith(_LFS)


def refuse_lfs_pointer(path: Place, head: bytes, kind: type[InputError]) -> None:
    """Raise `kind` if a file's first bytes are those of a Git LFS pointer."""
    if is_lfs_pointer(head):
        raise kind(
            f"{path} is a Git LFS pointer of a few hundred bytes, not the file itself.",
            hint="Run `git lfs install && git lfs pull` in that folder, or download it with `hf download`.",
        )


def parse_json(data: bytes) -> Any:
    """Parse untrusted JSON. Raises ValueError, also for a duplicate key, of which json would drop the first.

    Half of a surrogate pair, which Python writes for a path that is not UTF-8, becomes U+FFFD: no file could hold it.
    """
    try:
        content = json.loads(data, object_pairs_hook=_table)
        return _well_formed(content) if _SURROGATE.search(data) else content
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _table(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    listed = list(pairs)
    found = dict(listed)
    if len(found) < len(listed):
        [(twice, _)] = Counter(key for key, _ in listed).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return found


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, dict):
        return _table((well_formed(key), _well_formed(item)) for key, item in value.items())
    return [_well_formed(item) for item in value] if isinstance(value, list) else value


def read_json(path: Place, kind: type[InputError], limit: int = 16 << 20) -> dict[str, Any]:
    """Read a JSON object from a file. Raises `kind` with the reason if that fails."""
    try:
        with open_file(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise read_error(path, error, kind) from error
    refuse_lfs_pointer(path, data[:64], kind)
    if len(data) > limit:
        raise kind(f"{path} exceeds {limit >> 20} MiB, too much for a file of that name.")
    try:
        content = parse_json(data)
    except ValueError as error:
        raise kind(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise kind(f"{path} contains a JSON {type(content).__name__}, not an object.")
    return content


def refuse_versions(path: Place, content: Mapping[str, Any], key: str, kind: type[InputError]) -> None:
    """Raise `kind` if a settings file names, under `key`, files that releases of transformers read in place of one."""
    if named := content.get(key):
        raise kind(
            f"{path} names other files, which transformers reads in place of the usual one from a release on ({key}:"
            f" {printable(str(named)[:80])}).",
            hint=f"Keep the file that is meant under its usual name, and remove {key}.",
        )


class RowReader:
    """Reads rows of tensors from one file with pread; opens it at the first read, unless it has changed."""

    def __init__(self, path: Path, kind: type[InputError]) -> None:
        self._path, self._kind, self._state = path, kind, FileState.of(path)
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                try:
                    descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError as error:
                    raise read_error(self._path, error, self._kind) from error
                if (now := FileState.of(descriptor)) != self._state:
                    os.close(descriptor)
                    raise changed(self._path, self._state, now, self._kind)
                self._descriptor = descriptor
            return self._descriptor

    def rows(self, entry: Entry, first: int, count: int) -> NDArray[Any]:
        """Return rows of the tensor at `entry`, and never a byte outside it; safe to call from several threads."""
        entry.info.require_rows(first, count, self._path, self._kind)
        shape = (count, *entry.info.shape[1:]) if entry.info.shape else ()
        block = np.empty(shape, STORAGE[entry.info.dtype])
        offset = entry.offset + first * (block.nbytes // max(1, count))
        view = block.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            got = os.preadv(self._open(), [view[done:]], offset + done)
            if not got:
                raise self._kind(f"{self._path} was truncated while it was read.")
            done += got
        return block


class Shard:
    """One safetensors file.

    Args:
        path: Path of the file.
        kind: Class of the errors, CheckpointError or AdapterError.

    Raises:
        InputError: (of class `kind`) Not such a file, truncated, or its header contradicts itself.
    """

    def __init__(self, path: Path, kind: type[InputError]) -> None:
        self.path = path
        self._kind = kind
        self._file = RowReader(path, kind)
        try:
            size = path.stat().st_size
            with open_file(path) as file:
                start = file.read(64)
                length = int.from_bytes(start[:8], "little")
                self._check_start(start, length, size)
                file.seek(8)
                header = self._parse(file.read(length))
        except OSError as error:
            raise read_error(path, error, kind) from error
        self.metadata: dict[str, Any] = header.pop("__metadata__", None) or {}
        self.entries: Mapping[str, Entry] = {
            name: self._entry(name, value, 8 + length, size) for name, value in header.items()
        }
        self._check_overlap()

    def _check_start(self, start: bytes, length: int, size: int) -> None:
        refuse_lfs_pointer(self.path, start, self._kind)
        if size < 8 or not start[8:9] == b"{":
            raise self._kind(
                f"{self.path} is not a safetensors file: its first bytes are {start[:9].hex(' ') or 'none'}."
            )
        if length > MAX_HEADER:
            raise self._kind(f"{self.path} claims a header of {length:,} bytes; whole models have less than 1 MB.")
        if 8 + length > size:
            raise self._kind(f"{self.path} ends inside its header: {size:,} bytes of {8 + length:,}. It was cut.")

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            header = parse_json(data)
        except ValueError as error:
            raise self._kind(f"The header of {self.path} is not JSON: {error}.") from error
        if not isinstance(header, dict):
            raise self._kind(f"The header of {self.path} is not a JSON object.")
        return header

    def _entry(self, name: str, value: Any, data: int, size: int) -> Entry:
        try:
            dtype, shape, (first, last) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            numbers = [*shape, first, last]
        except (TypeError, KeyError, ValueError) as error:
            raise self._kind(f"The header of {self.path} describes the tensor {name!r} in an unknown way.") from error
        if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
            raise self._kind(f"The header of {self.path} describes the tensor {name!r} in an unknown way.")
        if dtype not in STORAGE:
            raise self._kind(f"The tensor {name!r} in {self.path} has the format {dtype}, which is not supported.")
        info = TensorInfo(dtype, shape)
        if last - first != info.nbytes:
            raise self._kind(
                f"The tensor {name!r} in {self.path} takes {last - first:,} bytes; {dtype} {list(shape)} would take"
                f" {info.nbytes:,}."
            )
        if data + last > size:
            raise self._kind(
                f"{self.path} is cut: the tensor {name!r} ends at byte {data + last:,}, the file at {size:,}.",
                hint="The download is incomplete. Download this file again.",
            )
        return Entry(info, data + first)

    def _check_overlap(self) -> None:
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].offset):
            if entry.offset < end:
                raise self._kind(f"The tensor {name!r} in {self.path} overlaps another tensor of the file.")
            end = entry.offset + entry.info.nbytes

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows of a tensor in numpy's form of its format; safe to call from several threads."""
        return self._file.rows(self.entries[name], first, count)
