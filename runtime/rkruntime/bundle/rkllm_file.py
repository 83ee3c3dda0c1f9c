"""What a .rkllm file reveals in plain bytes: magic, container version, counts, and the toolkit's name at its end.

The vendor does not document the container. Several public studies agree on the four fields and the tail
(magic `da ee b3 36`, version, u64 tensor count, u64 key count, little-endian; ASCII `rkllm-toolkit version: 1.3.1` at
the end of files of newer toolkits). Everything else in the file is masked and is not read here: platform, type,
cores and context are in the bundle's manifest, and in the runtime's log after a load.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkruntime.errors import ModelFileError
from rkruntime.files import open_regular
from rkruntime.words import counted

MAGIC: Final = bytes.fromhex("daeeb336")
_HEADER: Final = struct.Struct("<4sIQQ")
_TAIL: Final = 256
_TOOLKIT: Final = re.compile(rb"rkllm-toolkit version: ([0-9A-Za-z.+_-]{1,40})\s*\0*\Z")
# Least size of a tensor's or key's record in bytes: counts that need more bytes than the file has are wrong.
_LEAST_RECORD: Final = 16

# First bytes of other files that users mistake for a model, and what they are.
_OTHERS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself: fetch it with `git lfs pull`"),
    (b"GGUF", "a GGUF file, for llama.cpp"),
    (b"RKEMU", "a model file of RKEdge's emulator"),
    (b"RKNN", "an RKNN model, for librknnrt, not librkllmrt"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint"),
    (b"\x7fELF", "a program or a library"),
    (b"<", "a web page: the download returned an error or a login page"),
    (b"{", "a JSON text"),
)


@dataclass(frozen=True)
class RkllmFile:
    """The readable part of a model file.

    Attributes:
        size: Size in bytes.
        container_version: 3 in every file described so far.
        tensors, keys: Numbers of records in the container's directory.
        toolkit_version: As stated at the end of the file; empty for files of older toolkits, which have no such text.
    """

    path: Path
    size: int
    container_version: int
    tensors: int
    keys: int
    toolkit_version: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {
            "size": self.size,
            "container_version": self.container_version,
            "tensors": self.tensors,
            "keys": self.keys,
            "toolkit_version": self.toolkit_version,
        }


def read_rkllm(path: Path) -> RkllmFile:
    """Read the plain fields of a .rkllm file: a few hundred bytes, whatever its size.

    Raises:
        ModelFileError: It is truncated inside its header, or something else altogether.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_HEADER.size)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not head.startswith(MAGIC):
        raise _not_rkllm(path, head, size)
    if size < _HEADER.size:
        raise ModelFileError(f"{path} has {counted(size, 'byte')} and ends inside its header: it is truncated.")
    _, version, tensors, keys = _HEADER.unpack(head)
    if _LEAST_RECORD * (tensors + keys) > size:
        raise ModelFileError(
            f"{path} claims {tensors:,} tensors and {keys:,} keys, which its {size:,} bytes cannot hold: it is"
            " truncated or damaged."
        )
    found = _TOOLKIT.search(tail)
    return RkllmFile(path, size, version, tensors, keys, found[1].decode() if found else "")


def _not_rkllm(path: Path, head: bytes, size: int) -> ModelFileError:
    if not size:
        return ModelFileError(f"{path} is empty.")
    for magic, meaning in _OTHERS:
        if head.startswith(magic):
            return ModelFileError(f"{path} is not a .rkllm file: it is {meaning}.")
    return ModelFileError(
        f"{path} is not a .rkllm file: it begins with {head[:4].hex(' ')} instead of {MAGIC.hex(' ')}."
    )
