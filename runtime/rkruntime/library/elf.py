"""Read an ELF file's class, machine and exported symbols without loading it."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkruntime.errors import LibraryError

MACHINES: Final = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
"""e_machine to the name that `uname -m` prints (64-bit machines only)."""

_SHARED = 3  # e_type ET_DYN
_LOAD, _DYNAMIC = 1, 2  # program header types
_GNU_HASH, _HASH, _STRTAB, _SYMTAB = 0x6FFFFEF5, 4, 5, 6  # dynamic tags
_SYMBOL = struct.Struct("<IBBHQQ")
_MAX_SYMBOLS = 1 << 20


@dataclass(frozen=True)
class ElfFile:
    """An ELF file: `bits` is 32 or 64, `machine` a name in MACHINES or `machine N`, `symbols` the exported names."""

    bits: int
    machine: str
    symbols: frozenset[str]


class _Image:
    """A mapped ELF file. Every access is checked: a file that lies about its offsets raises LibraryError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.segments: list[tuple[int, int, int]] = []  # address, offset in the file, size in the file

    def broken(self, what: str) -> LibraryError:
        return LibraryError(f"{self.path} is damaged: {what}.", hint="Copy or download it again, and compare its size.")

    def unpack(self, layout: str | struct.Struct, offset: int) -> tuple[int, ...]:
        form = struct.Struct(layout) if isinstance(layout, str) else layout
        if not 0 <= offset <= len(self.data) - form.size:
            raise self.broken(f"it ends before byte {offset:,}, which it refers to")
        return form.unpack_from(self.data, offset)

    def offset_of(self, address: int) -> int:
        """Return the file offset of the byte that is loaded at an address."""
        for start, offset, size in self.segments:
            if start <= address < start + size:
                return offset + address - start
        raise self.broken(f"none of its segments contains the address {address:#x}, which it refers to")

    def text(self, offset: int) -> str:
        end = self.data.find(b"\0", offset, offset + 4096)
        return "" if end < 0 else self.data[offset:end].decode("utf-8", "replace")


def read_elf(path: Path, data: mmap.mmap) -> ElfFile:
    """Read a mapped file's header and dynamic symbols (no symbols unless it is 64-bit and little-endian).

    Raises:
        LibraryError: Not an ELF shared library, or a damaged one.
    """
    image = _Image(path, data)
    if data[:4] != b"\x7fELF" or len(data) < 64:
        raise LibraryError(f"{path} is not a shared library: it does not begin like an ELF file.")
    bits = {1: 32, 2: 64}.get(data[4], 0)
    kind, machine = image.unpack("<HH", 16)
    name = MACHINES.get(machine, f"machine {machine}")
    if bits != 64 or data[5] != 1:
        return ElfFile(bits, name, frozenset())
    if kind != _SHARED:
        raise LibraryError(f"{path} is an ELF file of type {kind}, not a shared library.")
    return ElfFile(bits, name, _exported(image))


def _exported(image: _Image) -> frozenset[str]:
    """Return the names of the defined dynamic symbols, found through the dynamic segment as a loader does."""
    tags: dict[int, int] = {}
    (table,) = image.unpack("<Q", 32)
    entry_size, count = image.unpack("<HH", 54)
    for at in range(count):
        kind, _, offset, address, _, size, *_ = image.unpack("<IIQQQQQQ", table + at * entry_size)
        if kind == _LOAD:
            image.segments.append((address, offset, size))
        elif kind == _DYNAMIC:
            tags = dict(_dynamic(image, offset, size))
    if not {_SYMTAB, _STRTAB} <= tags.keys():
        return frozenset()
    symbols, strings = image.offset_of(tags[_SYMTAB]), image.offset_of(tags[_STRTAB])
    names = set()
    for at in range(1, _symbol_count(image, tags)):
        name, info, _, section, _, _ = image.unpack(_SYMBOL, symbols + at * _SYMBOL.size)
        if section and info >> 4:  # defined here, and not local
            names.add(image.text(strings + name))
    return frozenset(names)


def _dynamic(image: _Image, offset: int, size: int) -> list[tuple[int, int]]:
    entries = []
    for at in range(offset, offset + min(size, 1 << 16) - 15, 16):
        tag, value = image.unpack("<QQ", at)
        if tag == 0:
            break
        entries.append((tag, value))
    return entries


def _symbol_count(image: _Image, tags: dict[int, int]) -> int:
    """Return the number of dynamic symbols, which only the hash table states."""
    if _HASH in tags:
        return min(image.unpack("<II", image.offset_of(tags[_HASH]))[1], _MAX_SYMBOLS)
    if _GNU_HASH not in tags:
        return 0
    base = image.offset_of(tags[_GNU_HASH])
    buckets, first, bloom, _ = image.unpack("<4I", base)
    if max(buckets, bloom) > _MAX_SYMBOLS:
        raise image.broken("its symbol table has an impossible size")
    chains = base + 16 + bloom * 8 + buckets * 4
    last = max(image.unpack(f"<{buckets}I", base + 16 + bloom * 8), default=0)
    if last < first:
        return first
    # The last bucket's chain ends at the last symbol, whose lowest bit is set.
    while last < _MAX_SYMBOLS and not image.unpack("<I", chains + (last - first) * 4)[0] & 1:
        last += 1
    return last + 1
