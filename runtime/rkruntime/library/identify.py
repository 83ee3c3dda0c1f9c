"""Tell the release of a librkllmrt.so from the file, before anything in it is called.

A wrong layout does not fail: it corrupts memory, or crashes at the first token. The version text inside the library
decides, but the ELF header and the exported symbols must agree with it. Symbols alone cannot tell 1.2.x from 1.3.0.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkruntime.abi import CALLABLE, RELEASES, Release, abi_of, release_named, since
from rkruntime.errors import LibraryError
from rkruntime.files import AnyPath, as_path, open_regular
from rkruntime.folders import hint_if_hidden
from rkruntime.library.elf import ElfFile, read_elf
from rkruntime.schema import check_value

# Beginning of the version text. Seen in 1.2.0, 1.2.1b1 and 1.3.1, as
# `RKLLM SDK (version: 1.2.1b1 | target: Linux | build: 27637c95 2025-05-02 17:46:07)`.
_MARK: Final = b"RKLLM SDK (version: "
# Format string of the log's line on the release; 1.2.1b1 has the bare version next to it. For libraries without _MARK.
_LOG_FORMAT: Final = b"rkllm-runtime version: %s"
_VERSION: Final = re.compile(r"\d+\.\d+\.\d+(?:b\d*)?")
_KNOWN_FUNCTIONS: Final = frozenset(name for version in RELEASES for name in abi_of(version).functions)


@dataclass(frozen=True)
class Identity:
    """What a library file is.

    Attributes:
        bits: 32 or 64.
        machine: CPU architecture as `uname -m` prints it: `aarch64`, `x86_64`.
        version: Release according to the version text; empty without one.
        version_line: The whole version text, including build id and date.
        release: The release whose layout to use; None if unknown or not supported (`problem` says why).
        forced: Whether the user chose the layout.
        emulated: Whether the library says that it is RKEdge's emulator.
        problem: Why the library must not be called; empty if it may be.
        hint: What to do about the problem.
        functions: The functions of rkllm.h that the library exports.
        notice: What is odd about a library that may be called; usually empty.
    """

    path: Path
    bits: int
    machine: str
    version: str
    version_line: str
    release: Release | None
    forced: bool
    emulated: bool
    problem: str
    hint: str
    functions: frozenset[str]
    notice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {
            "path": str(self.path),
            "bits": self.bits,
            "machine": self.machine,
            "version": self.version or None,
            "version_line": self.version_line or None,
            "layout": self.release.layout if self.release else None,
            "layout_evidence": self.release.evidence if self.release else None,
            "forced": self.forced,
            "emulated": self.emulated,
            "problem": self.problem or None,
            "notice": self.notice or None,
            "functions": sorted(self.functions),
        }


def _version_lines(data: mmap.mmap | bytes) -> list[str]:
    """Return every distinct version text in the file."""
    lines: dict[str, None] = {}
    at = data.find(_MARK)
    while at >= 0:
        end = data.find(b"\0", at, at + 256)
        text = data[at : end if end >= 0 else at + 256].decode("utf-8", "replace")
        lines[text[: text.find(")") + 1] or text] = None
        at = data.find(_MARK, at + 1)
    return list(lines)


def _version_in(line: str) -> str:
    found = _VERSION.match(line, len(_MARK))
    return found.group() if found and line[found.end() :].lstrip()[:1] in ("|", ")") else ""


def _bare_versions(data: mmap.mmap | bytes) -> list[str]:
    """Return the known releases whose bare version text is right before or after _LOG_FORMAT in the file."""
    found: dict[str, None] = {}
    at = data.find(_LOG_FORMAT)
    while at >= 0:
        texts = [text for text in data[max(0, at - 256) : at + 256].split(b"\0") if text]
        place = next(i for i, text in enumerate(texts) if _LOG_FORMAT in text)
        for text in (*texts[max(0, place - 1) : place], *texts[place + 1 : place + 2]):
            if (name := text.decode("ascii", "replace")) in RELEASES:
                found[name] = None
        at = data.find(_LOG_FORMAT, at + 1)
    return list(found)


def _missing(version: str, functions: frozenset[str]) -> str:
    """Say which function of a release this file does not export; empty if it exports all."""
    missing = sorted(frozenset(abi_of(version).functions) - functions)
    return f"release {version} has {missing[0]}, which this file does not export" if missing else ""


def _additional(version: str, functions: frozenset[str]) -> str:
    """Say which function this file exports that a release does not declare; empty if none."""
    extra = sorted((functions & _KNOWN_FUNCTIONS) - frozenset(abi_of(version).functions))
    return f"this file exports {extra[0]}, which came with {since(extra[0])}, after {version}" if extra else ""


def _versions(data: mmap.mmap | bytes) -> tuple[list[str], list[str]]:
    """Return the version texts, and the releases that they name."""
    lines = _version_lines(data)
    return lines, list(dict.fromkeys(map(_version_in, lines))) if lines else _bare_versions(data)


def _look(path: Path) -> tuple[ElfFile, list[str], list[str]]:
    """Return the file's ELF facts, its version texts, and the releases that they name."""
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_elf(path, data), *_versions(data)
    except ValueError as error:  # mmap of an empty file
        raise LibraryError(f"{path} is empty.") from error
    except OSError as error:
        hint = hint_if_hidden(path)
        raise LibraryError(f"{path} cannot be read: {error.strerror or error}.", hint=hint) from error


def _judge(elf: ElfFile, lines: list[str], versions: list[str], given: str | None) -> tuple[Release | None, str, str]:
    """Return the release whose layout fits, or None with the reason and what to do."""
    functions = elf.symbols & _KNOWN_FUNCTIONS
    if elf.bits != 64:
        return None, f"it is a {elf.bits}-bit library, but RKEdge calls only 64-bit ones", "Use the aarch64 library."
    if not functions:
        return None, "it exports no function of rkllm.h", "Name librkllmrt.so, not librknnrt.so or another library."
    if len(versions) > 1:
        return None, f"it contains several version texts: {', '.join(versions)}", "Use the vendor's original file."
    version = versions[0] if versions else ""
    if given is not None and version not in RELEASES:
        release = release_named(given)
        problem = _missing(given, functions) or _additional(given, functions)
        return (None, problem, "Name another release with --release.") if problem else (release, "", "")
    if version not in RELEASES:
        return None, _unknown(version, lines), "Update rkedge, or try the nearest release with --release (docs/abi.md)."
    if RELEASES[version].refused:
        return None, f"it is release {version}: {RELEASES[version].refused}", "Install librkllmrt.so 1.2.3."
    if problem := _missing(version, functions):
        return None, f"its version text says {version}, but {problem}", "Use the vendor's original file."
    if given is not None and release_named(given).layout != RELEASES[version].layout:
        return None, f"it is release {version}, whose layout is not that of {given}", "Omit --release."
    return RELEASES[version], "", ""


def _unknown(version: str, lines: list[str]) -> str:
    if not version:
        return f"its version text is not readable: {lines[0]!r}" if lines else "it has no RKLLM version text"
    # Imported here because the worker imports this module and has no installed packages.
    from rkruntime.versions import version as order

    newest = CALLABLE[-1]
    age = "newer than" if order(version) > order(newest) else "not among those known up to"
    return f"it is release {version}, {age} {newest}, and its layout is not known"


def inspect_library(path: Path, release: str | None = None) -> Identity:
    """Identify a library file, even one for another machine or of an unknown release.

    Args:
        release: Release whose layout to use if the file's own release is unknown.

    Raises:
        LibraryError: Not a readable shared library, or `release` is not a release.
    """
    if release is not None:
        release_named(release)
    return _identity(path, *_look(path), release)


def identify_parts(path: str, elf: ElfFile, excerpts: bytes) -> Identity:
    """Identify a library on another machine from its ELF facts and excerpts around its version texts."""
    return _identity(Path(path), elf, *_versions(excerpts), None)


def _identity(path: Path, elf: ElfFile, lines: list[str], versions: list[str], release: str | None) -> Identity:
    found, problem, hint = _judge(elf, lines, versions, release)
    return Identity(
        path=path,
        bits=elf.bits,
        machine=elf.machine,
        version=versions[0] if len(versions) == 1 else "",
        version_line=lines[0] if lines else "",
        release=found,
        forced=release is not None and found is not None and found.version != (versions or [""])[0],
        emulated=any("emulator" in line.lower() for line in lines),
        problem=problem,
        hint=hint,
        functions=elf.symbols & _KNOWN_FUNCTIONS,
        notice=_notice(found, lines, elf.symbols) if found else "",
    )


def _notice(release: Release, lines: list[str], functions: frozenset[str]) -> str:
    """Say what is odd about a library that may be called; empty if nothing."""
    found = [] if lines else [f"it has no RKLLM version text, but {release.version} next to the format of its log"]
    return "; ".join(filter(None, [*found, _additional(release.version, functions)]))


def identify(path: AnyPath, release: str | None = None) -> Identity:
    """Identify a library that may be called with the layout of its `release`.

    Raises:
        LibraryError: It must not be called; message and hint say why.
    """
    path = as_path("path", path)
    check_value("release", str | None, release)
    identity = inspect_library(path, release)
    if identity.release is None:
        raise LibraryError(
            f"{path} cannot be used: {identity.problem}.", hint=identity.hint, details=identity.as_dict()
        )
    return identity


def check_machine(path: Path, machine: str) -> None:
    """Raise LibraryError if a library is for another machine than this one."""
    here = os.uname().machine
    if sys.maxsize < 1 << 32:  # on a 64-bit kernel, uname does not show this
        raise LibraryError(
            f"This Python is a 32-bit program, which cannot load {path}.",
            hint="Use a 64-bit Python, and a 64-bit system image: getconf LONG_BIT must say 64.",
        )
    if machine != here:
        raise LibraryError(
            f"{path} is for {machine}, but this machine is {here}.",
            hint="Use it on the board; on a PC, use the emulator.",
        )
