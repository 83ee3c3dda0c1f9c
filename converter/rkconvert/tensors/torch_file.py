"""Read older .bin files (torch.save) without torch, and without running any code in their pickle.

Since torch 1.6 such a file is a ZIP archive of uncompressed entries: `data.pkl` describes the tensors, `data/N` has the
bytes of storage N, and `byteorder` their order (torch/serialization.py).
"""

from __future__ import annotations

import math
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from rkconvert.tensors.formats import STORAGE
from rkconvert.tensors.shards import Entry, RowReader, refuse_lfs_pointer
from rkconvert.tensors.torch_pickle import MAX_PICKLE, Tensor, unpickle
from rkconvert.tensors.weights import TensorInfo
from rkruntime.errors import InputError
from rkruntime.files import open_regular, read_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOCAL_HEADER: Final = 30
# Bytes of `byteorder`, which is "little" or "big".
_MAX_ORDER: Final = 16
# Limit in bytes on a tensor that is not row-major: it is read whole, and a hostile one could claim any size.
_MAX_STRIDED: Final = 1 << 30


def _span(tensor: Tensor) -> int:
    """Return the number of elements from the first to the last that the tensor uses in its storage."""
    if not math.prod(tensor.shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous and row-major."""
    dense = [math.prod(tensor.shape[at + 1 :]) for at in range(len(tensor.shape))]
    steps = zip(tensor.stride, dense, tensor.shape, strict=True)
    return all(step == plain for step, plain, size in steps if size > 1)


class TorchFile:
    """One .bin file; `entries` and `read` as in a safetensors shard.

    Raises:
        InputError: (of class `kind`) Not such a file, truncated, or its pickle asks for more than tensors.
    """

    def __init__(self, path: Path, kind: type[InputError]) -> None:
        self.path = path
        self._kind = kind
        self._file = RowReader(path, kind)
        self._strided: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        # The tensor rearranged last, by name: it is requested block by block.
        self._rearranged: tuple[str, NDArray[Any]] = ("", np.empty(0))
        try:
            with open_regular(path) as file:
                refuse_lfs_pointer(path, file.read(64), kind)
                self.entries: Mapping[str, Entry] = self._read_archive(file)
        except OSError as error:
            raise read_error(path, error, kind) from error
        except zipfile.BadZipFile as error:
            raise kind(
                f"{path} is not a .bin file of torch 1.6 or newer, or is truncated: {error}.",
                hint="Download it again, or use the model's safetensors files.",
            ) from error

    def _read_archive(self, file: BinaryIO) -> dict[str, Entry]:
        archive = zipfile.ZipFile(file)
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        member = members.get("data.pkl")
        if member is None or member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_PICKLE:
            raise self._kind(f"{self.path} is a ZIP archive without an uncompressed data.pkl of reasonable size.")
        order = members.get("byteorder")
        if order is not None and (order.file_size > _MAX_ORDER or archive.read(order).strip() != b"little"):
            raise self._kind(
                f"{self.path} does not contain little-endian numbers.",
                hint="Save it again on a little-endian computer, or as safetensors.",
            )
        found = self._unpickle(archive, member)
        for name, value in found.items():
            # bitsandbytes stored this as a text until April 2024, and as a number since (its pull request 1164).
            if name.endswith(".weight_format") and isinstance(value, str) and value != "row":
                raise self._kind(
                    f"{self.path} contains an int8 tensor that is not stored row by row: {name} is {value[:40]!r}.",
                    hint="Start from the original 16-bit checkpoint.",
                )
        return {
            name: self._entry(file, name, value, members) for name, value in found.items() if isinstance(value, Tensor)
        }

    def _unpickle(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> dict[str, Any]:
        try:
            found = unpickle(archive.read(member))
        except zipfile.BadZipFile:
            raise
        except Exception as error:  # A damaged pickle can fail with any exception.
            why = str(error) or type(error).__name__
            raise self._kind(f"{self.path} is not a plain table of tensors: {why}. Nothing of it was run.") from error
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise self._kind(f"{self.path} contains a {type(found).__name__}, not a table of tensors.")
        return found

    def _entry(self, file: BinaryIO, name: str, tensor: Tensor, members: Mapping[str, zipfile.ZipInfo]) -> Entry:
        info = TensorInfo(tensor.storage.dtype, tensor.shape)
        width = STORAGE[info.dtype].itemsize
        if min((*tensor.shape, *tensor.stride, tensor.offset)) < 0 or len(tensor.stride) != len(tensor.shape):
            raise self._kind(f"The tensor {name!r} in {self.path} has an impossible shape, strides or offset.")
        span = _span(tensor)
        if not _is_dense(tensor):
            if max(span * width, info.nbytes) > _MAX_STRIDED:
                raise self._kind(
                    f"The tensor {name!r} in {self.path} is not row-major, and is too large to rearrange.",
                    hint="Save it again with .contiguous(), or as safetensors.",
                )
            self._strided[name] = tensor
        member = members.get(f"data/{tensor.storage.key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise self._kind(f"{self.path} does not contain the bytes of the tensor {name!r}.")
        if (tensor.offset + span) * width > member.file_size:
            raise self._kind(f"The tensor {name!r} in {self.path} is larger than its storage.")
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise self._kind(f"{self.path} is damaged where the tensor {name!r} starts.")
        start = member.header_offset + _LOCAL_HEADER
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return Entry(info, start + tensor.offset * width)

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows of a tensor in numpy's form of its format; safe to call from several threads."""
        entry = self.entries[name]
        if name not in self._strided:
            return self._file.rows(entry, first, count)
        entry.info.require_rows(first, count, self.path, self._kind)
        with self._lock:
            if self._rearranged[0] != name:
                self._rearranged = name, self._rearrange(self._strided[name], entry)
            return self._rearranged[1][first : first + count]

    def _rearrange(self, tensor: Tensor, entry: Entry) -> NDArray[Any]:
        span = _span(tensor)
        memory = self._file.rows(Entry(TensorInfo(entry.info.dtype, (span,)), entry.offset), 0, span)
        steps = [step * memory.itemsize for step in tensor.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(memory, tensor.shape, steps, writeable=False))
