"""Every librkllmrt.so that was found: which one is first, and what it needs."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

from rkboard.doctor.document import Board, Library
from rkboard.doctor.finding import Check, Verdict, ok
from rkruntime.engine.open import LIBRARY, SEARCHED
from rkruntime.versions import version

_VENDOR: Final = "https://github.com/airockchip/rknn-llm/tree/main/rkllm-runtime"
_MISMATCH: Final = "https://github.com/airockchip/rknn-llm/issues/389 (reported)"


def first_library(board: Board) -> Library | None:
    """Return the library that rkedge takes by default, searched as `rkruntime.engine.open.find_library` does."""
    found = {str(PurePosixPath(one.path).parent): one for one in reversed(board.document.libraries) if _exact(one)}
    places = [*filter(None, board.me.library_path.split(":")), *SEARCHED]
    return next((found[place] for place in places if place in found), next(iter(board.document.libraries), None))


def _exact(library: Library) -> bool:
    return PurePosixPath(library.path).name == LIBRARY


def library_found(board: Board) -> Verdict:
    """Whether there is a librkllmrt.so."""
    library = first_library(board)
    if library:
        return ok(f"The library is {library.path}.")
    return Verdict(
        "warning",
        f"There is no {LIBRARY} in the usual places.",
        "A model for the NPU needs the vendor's runtime library.",
        f"Download it, and: sudo install -m 644 {LIBRARY} /usr/lib/ && sudo ldconfig",
        _VENDOR,
    )


def library_release(board: Board) -> Verdict | None:
    """Whether its release is known and may be called."""
    library = first_library(board)
    if library is None:
        return None
    if library.error:
        return Verdict(
            "failure",
            f"{library.path} cannot be read as a library ({library.error}).",
            "It may be cut, or closed to this user.",
            f"sudo chmod 644 {library.path}, or copy it again and compare its size",
        )
    identity = library.identity
    if identity.problem:
        return Verdict("failure", f"{library.path}: {identity.problem}.", mend=identity.hint, source="docs/abi.md")
    said = f"{library.path} is release {identity.version or '(by its log format)'}."
    return Verdict("note", said, why=identity.notice) if identity.notice else ok(said)


def library_machine(board: Board) -> Verdict | None:
    """Whether it is for this machine's processor."""
    library = first_library(board)
    if library is None or library.error:
        return None
    here = board.me.machine if board.document.root == "/" else "aarch64"
    if library.identity.machine == here and library.bits == 64:
        return ok(f"{library.path} is for {here}.")
    return Verdict(
        "failure",
        f"{library.path} is for {library.identity.machine} ({library.bits} bits), but this machine is {here}.",
        "The loader refuses it.",
        "Take the library from rkllm-runtime/Linux/librkllm_api/aarch64 of the vendor's repository.",
        _VENDOR,
    )


def library_twice(board: Board) -> Verdict | None:
    """Whether there are several releases of it: the first on the path is the one that is loaded."""
    first = first_library(board)
    found = [one for one in board.document.libraries if not one.error and (one.loader or one is first)]
    if not found:
        return None
    releases = {one.identity.version for one in found}
    if len(releases) == 1:
        return ok(f"All of {LIBRARY} that were found are of one release.")
    listed = ", ".join(f"{one.path}: {one.identity.version or 'unknown'}" for one in found)
    return Verdict(
        "warning",
        f"There are several releases: {listed}.",
        "Each program takes the first one on its own path; models are refused by a release older than their toolkit.",
        "Remove the old ones, or name one: RKEDGE_LIBRARY, or library in the daemon's settings.",
        _MISMATCH,
    )


def library_on_path(board: Board) -> Verdict | None:
    """Whether programs other than rkedge find it."""
    library = first_library(board)
    if library is None:
        return None
    if library.loader:
        return ok(f"{library.path} is on the loader's path.")
    return Verdict(
        "note",
        f"{library.path} is not on the loader's path.",
        "rkedge finds it there if it is told; other programs say that it cannot be opened.",
        f"export RKEDGE_LIBRARY={library.path}",
        "https://github.com/airockchip/rknn-llm/issues/59 (reported)",
    )


def library_needs(board: Board) -> Verdict | None:
    """Whether the libraries that it needs are there."""
    library = first_library(board)
    if library is None or library.error:
        return None
    if not library.missing:
        return ok("What it needs is there.")
    packages = {"libgomp.so.1": "sudo apt install libgomp1", "libstdc++.so.6": "sudo apt install libstdc++6"}
    mend = packages.get(library.missing[0], "libomp.so comes with the vendor's compiler: put it next to the library")
    return Verdict(
        "failure",
        f"{library.path} needs {', '.join(library.missing)}, which is not installed.",
        "The loader refuses it.",
        mend,
        "https://github.com/Luna-Inference/open-rkllm (readelf of 1.2.1b1: libgomp.so.1)",
    )


def library_libc(board: Board) -> Verdict | None:
    """Whether the system is new enough for it."""
    library = first_library(board)
    here = board.me.libc.removeprefix("glibc").strip()
    if library is None or not library.glibc:
        return None
    try:
        new_enough = version(here) >= version(library.glibc)
    except ValueError:
        return Verdict("unknown", f"The library needs glibc {library.glibc}; that of the system could not be read.")
    if new_enough:
        return ok(f"The library needs glibc {library.glibc}; the system has {here}.")
    return Verdict(
        "failure",
        f"The library needs glibc {library.glibc}, but the system has {here or 'another C library'}.",
        "The loader refuses it.",
        "Use a newer image (Debian 11 and Ubuntu 20.04 or later have 2.31).",
        "https://sourceware.org/glibc/wiki/Glibc%20Timeline",
    )


CHECKS: Final[tuple[Check, ...]] = (
    library_found,
    library_release,
    library_machine,
    library_twice,
    library_on_path,
    library_needs,
    library_libc,
)
