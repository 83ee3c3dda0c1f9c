"""The probe's document: what a board said of itself. All of it is hostile input, checked and bounded here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any, Final

from rkboard.doctor import probe
from rkruntime.checks import machine
from rkruntime.checks.preflight import ModelFacts
from rkruntime.errors import ServiceError
from rkruntime.library.elf import MACHINES, ElfFile
from rkruntime.library.identify import Identity, identify_parts
from rkruntime.schema import Between, Length, build

MARK: Final = probe.MARK.encode()
MOST_BYTES: Final = 2 * probe.MOST_TOTAL
"""A document is at most this long: more than the probe's own bounds add up to."""
_MOST: Final = {
    "files": 2 * probe.MOST_FILES, "folders": 64, "links": probe.MOST_FILES, "nodes": probe.MOST_FILES, "disks": 8,
    "processes": probe.MOST_SHOWN, "libraries": probe.MOST_LIBRARIES, "log": probe.MOST_LINES, "problems": 32,
}  # fmt: skip

_Name = Annotated[str, Length(4096)]
_Text = Annotated[str, Length(1 << 17)]
_Count = Annotated[int, Between(0, 1 << 63)]
_Id = Annotated[int, Between(0, 1 << 32)]
_NPU_NODE: Final = re.compile(r"dev/(?:dri/(?:card|renderD)\d+|rknpu)")


@dataclass(frozen=True)
class Read:
    """The text of a file (`more`: it is only the beginning), or the code of the error, such as EACCES."""

    text: _Text | None = None
    error: _Name | None = None
    more: bool = False


@dataclass(frozen=True)
class Node:
    """A file in /dev or a socket. `access`: the user may read and write it; `driver`: the driver's name for itself."""

    kind: _Name
    mode: Annotated[int, Between(0, 0o7777)]
    uid: _Id
    gid: _Id
    access: bool
    link: bool = False
    driver: _Name = ""
    version: _Name = ""
    error: _Name = ""


@dataclass(frozen=True)
class Me:
    """The user and the Python that looked. `open_files`: the soft and the hard limit, None without one."""

    uid: _Id
    user: _Name
    groups: tuple[_Id, ...]
    known_groups: dict[str, _Id]
    open_files: tuple[_Count | None, ...]
    cpus: tuple[_Count, ...]
    python: _Name
    bits: _Count
    machine: _Name
    libc: _Name
    venv: bool
    sudo: bool
    time: Annotated[float, Between(-1e12, 1e12)]
    library_path: _Name


@dataclass(frozen=True)
class Process:
    """A process. `memory`: in bytes; `nodes`: the NPU's nodes that it has open; `me`: it is the probe itself."""

    pid: _Count
    name: _Name
    uid: _Id
    memory: _Count
    nodes: tuple[_Name, ...]
    me: bool = False


@dataclass(frozen=True)
class Library:
    """A librkllmrt.so. `loader`: it is in one of the loader's folders; `missing`: libraries that it needs and lacks."""

    path: _Name
    loader: bool
    size: _Count = 0
    bits: _Count = 0
    elf_machine: _Count = 0
    version_texts: tuple[_Name, ...] = ()
    log_formats: tuple[_Name, ...] = ()
    needs: tuple[_Name, ...] = ()
    missing: tuple[_Name, ...] = ()
    functions: tuple[_Name, ...] = ()
    glibc: _Name = ""
    error: _Name = ""

    @cached_property
    def identity(self) -> Identity:
        """The library's release, or why it must not be called."""
        elf = ElfFile(
            self.bits, MACHINES.get(self.elf_machine, f"machine {self.elf_machine}"), frozenset(self.functions)
        )
        texts = "\0".join((*self.version_texts, *self.log_formats))
        return identify_parts(self.path, elf, texts.encode("utf-8", "replace"))


@dataclass(frozen=True)
class Disk:
    """The free and the whole space of a file system, in bytes."""

    free: _Count
    size: _Count


@dataclass(frozen=True)
class Document:
    """The whole document; paths are relative to the root of the file tree."""

    schema: _Name
    root: _Name
    seconds: Annotated[float, Between(0, 1e6)]
    me: Me
    files: dict[str, Read]
    folders: dict[str, tuple[_Name, ...]]
    links: dict[str, _Name]
    nodes: dict[str, Node]
    processes: tuple[Process, ...]
    libraries: tuple[Library, ...]
    disks: dict[str, Disk]
    log: tuple[_Name, ...]
    problems: tuple[_Name, ...]
    hidden_processes: _Count = 0

    @classmethod
    def parse(cls, line: bytes) -> Document:
        """Read the document from the line that the probe prints.

        Raises:
            ServiceError: It is not one.
        """
        if len(line) > MOST_BYTES:
            raise _nonsense("an endless line")
        try:
            data = json.loads(line.removeprefix(MARK))
        except RecursionError:
            raise _nonsense("something nested too deeply") from None
        except ValueError:
            raise _nonsense("something that is not JSON") from None
        if not isinstance(data, dict) or data.get("schema") != probe.SCHEMA:
            raise _nonsense("something other than what the probe prints")
        return cls.of(data)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Document:
        """Make the document from the probe's data before it is printed.

        Raises:
            ServiceError: It is not one.
        """
        found = build(cls, data, lambda what: _nonsense(f"a document in which {what}"))
        if any(len(getattr(found, name)) > most for name, most in _MOST.items()) or any(
            len(names) > probe.MOST_NAMES for names in found.folders.values()
        ):
            raise _nonsense("a document that is longer than the probe's")
        return found


def _nonsense(what: str) -> ServiceError:
    hint = "Something else may be answering in place of python3 on the board: ssh BOARD python3 --version"
    return ServiceError(f"The board sent {what}.", hint=hint)


@dataclass(frozen=True)
class Place:
    """A path in the document, with the methods of pathlib.Path that `rkruntime.checks.machine` calls."""

    document: Document
    path: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """The folder that it is in."""
        return Place(self.document, self.path.rpartition("/")[0])

    def __lt__(self, other: Place) -> bool:
        return self.path < other.path

    def __str__(self) -> str:
        return f"/{self.path}"

    def __truediv__(self, path: str, /) -> Place:
        return Place(self.document, f"{self.path}/{path}" if self.path else path)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Return the file's text. Raises OSError."""
        read = self.document.files.get(self.path, Read(error="ENOENT"))
        if read.text is not None:
            return read.text
        raise (PermissionError if read.error in ("EACCES", "EPERM") else OSError)(0, str(read.error), self.path)

    def is_dir(self) -> bool:
        """Whether a folder of that name was seen."""
        return self.path in self.document.folders or self.exists()

    def exists(self) -> bool:
        """Whether something of that name was seen, other than a broken link."""
        folder, _, name = self.path.rpartition("/")
        if self.path in self.document.nodes:
            return self.document.nodes[self.path].kind != "broken link"
        return name in self.document.folders.get(folder, ()) or any(
            path.startswith(f"{self.path}/") for path in self.document.files
        )

    def glob(self, pattern: str) -> Iterator[Place]:
        """Yield what was seen in this folder and matches: names in its listing, and files below it."""
        wanted = f"{self.path}/{pattern}"
        listed = (f"{self.path}/{name}" for name in self.document.folders.get(self.path, ()))
        for path in dict.fromkeys([*listed, *self._seen]):
            if path.count("/") == wanted.count("/") and fnmatchcase(path, wanted):
                yield Place(self.document, path)

    @property
    def _seen(self) -> Iterator[str]:
        """The files below this folder, and the folders in between."""
        for path in self.document.files:
            if path.startswith(f"{self.path}/"):
                parts = path[len(self.path) + 1 :].split("/")
                yield from (f"{self.path}/{'/'.join(parts[:end])}" for end in range(1, len(parts) + 1))

    def resolve(self) -> Place:
        """Follow the link that this path is, if it is one."""
        return Place(self.document, self.document.links.get(self.path, self.path))


@dataclass(frozen=True)
class Board:
    """A document, and answers to what the checks ask of it.

    Attributes:
        now: This machine's clock, in seconds since 1970; None if the board's cannot be compared with it.
        model: The model of a bundle to be judged on this board.
    """

    document: Document
    now: float | None = None
    model: ModelFacts | None = None

    @property
    def me(self) -> Me:
        """The user and the Python that looked."""
        return self.document.me

    @property
    def root(self) -> Place:
        """The root of the tree, for the functions of `rkruntime.checks.machine`."""
        return Place(self.document)

    def text(self, path: str) -> str | None:
        """Return a file's text without white space around it; None if it is not there or cannot be read."""
        read = self.document.files.get(path)
        return read.text.strip() if read and read.text is not None else None

    def first(self, *paths: str) -> str | None:
        """Return the text of the first of these files that has any."""
        return next((text for path in paths if (text := self.text(path))), None)

    def error(self, path: str) -> str | None:
        """Return why a file could not be read; None if it could, or is not there."""
        read = self.document.files.get(path)
        return read.error if read else None

    def closed(self, path: str) -> bool:
        """Whether this user may not read a file."""
        return self.error(path) in ("EACCES", "EPERM")

    def number(self, path: str) -> int | None:
        """Return the whole number that a file contains; None if it contains anything else."""
        text = self.text(path) or ""
        return int(text) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else None

    def numbers(self, path: str) -> list[int]:
        """Return the whole numbers in a file, such as a list of clocks."""
        return [int(word) for word in re.findall(r"\b\d{1,18}\b", self.text(path) or "", re.ASCII)]

    def mapping(self, path: str) -> dict[str, Any]:
        """Return the JSON object in a file; empty if there is none."""
        try:
            data = json.loads(self.text(path) or "")
        except (ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def names(self, path: str) -> tuple[str, ...]:
        """Return the names in a folder."""
        return self.document.folders.get(path, ())

    def matching(self, pattern: str) -> list[str]:
        """Return the paths of the files that were read and match a pattern."""
        return [path for path in self.document.files if fnmatchcase(path, pattern)]

    @cached_property
    def driver(self) -> machine.Driver:
        """The NPU driver."""
        return machine.driver(self.root)

    @cached_property
    def chip(self) -> str | None:
        """The SoC, such as `rk3588s`."""
        return machine.soc(self.root)

    @property
    def platform(self) -> str | None:
        """RKLLM's name for the SoC, such as `rk3588`."""
        return machine.platform_of(self.chip)

    @cached_property
    def npu_nodes(self) -> tuple[str, ...]:
        """The NPU's device nodes, as paths without the first slash."""
        return tuple(str(node).lstrip("/") for node in machine.npu_nodes(self.root))

    @property
    def release(self) -> str:
        """The kernel's release; empty if unknown."""
        return self.text("proc/sys/kernel/osrelease") or ""

    @property
    def computer(self) -> bool:
        """Whether its processor is one that no Rockchip board has, so that questions about an NPU make no sense."""
        return bool(self.me.machine) and not self.me.machine.startswith(("aarch64", "arm"))

    @property
    def vendor_kernel(self) -> bool:
        """Whether the kernel is of a line that the vendor's driver is made for, as the RKLLM manuals name them."""
        return re.match(r"(?:5\.10|6\.1)(?!\d)", self.release) is not None

    @property
    def npu_clock_is_safe(self) -> bool:
        """Whether the NPU's clock may be written: its driver is the one that the vendor's kernel was built with.

        Other builds of it lack what changes clock and voltage together. The taint of an out-of-tree module has an `O`.
        """
        return self.vendor_kernel and "O" not in (self.text("sys/module/rknpu/taint") or "")

    @property
    def in_container(self) -> bool:
        """Whether the probe ran inside a container."""
        text = self.text("proc/1/cgroup") or ""
        marked = any(path in self.document.nodes for path in (".dockerenv", "run/.containerenv"))
        return marked or re.search(r"/(?:docker|lxc|kubepods|containerd|libpod)\b", text) is not None
