"""A bundle on this board: the checks that run before a load, without the load."""

from __future__ import annotations

from typing import Final

from rkboard.doctor.checks.library import first_library
from rkboard.doctor.document import Board
from rkboard.doctor.finding import Check, Verdict, ok, worst
from rkruntime.checks import machine, preflight


def bundle_platform(board: Board) -> Verdict | None:
    """Whether it was made for this chip."""
    if board.model is None:
        return None
    return worst(list(preflight.check_platform(board.model, board.chip)), f"It was made for {board.model.platform}.")


def bundle_type(board: Board) -> Verdict | None:
    """Whether its quantized type exists for the chip."""
    if board.model is None:
        return None
    return worst(list(preflight.check_dtype(board.model)), f"{board.model.dtype} exists for {board.model.platform}.")


def bundle_releases(board: Board) -> Verdict | None:
    """Whether library, driver and toolkit fit each other."""
    if board.model is None:
        return None
    library = first_library(board)
    release = library.identity.version if library else ""
    found = list(preflight.check_pairs(board.model, release or None, board.driver.version, board.chip))
    return worst(found, "Nothing is known against this library, driver and toolkit together.")


def bundle_memory(board: Board) -> Verdict | None:
    """Whether it fits into free memory."""
    if board.model is None:
        return None
    return worst(list(preflight.check_memory(board.model, machine.memory(board.root))), "It fits into free memory.")


def bundle_cores(board: Board) -> Verdict | None:
    """Whether there are CPU cores for its NPU cores."""
    if board.model is None:
        return None
    cores = machine.cores(board.model.npu_cores, board.root, board.me.cpus)
    return worst(list(preflight.check_cpu_cores(board.model, cores)), "There are enough CPU cores for it.")


def bundle_disk(board: Board) -> Verdict | None:
    """Whether the disk has room for it."""
    disk = board.document.disks.get("/var/lib/rkedge") or board.document.disks.get("/")
    if board.model is None or board.model.size is None or disk is None:
        return None
    if disk.free > board.model.size:
        return ok("The disk has room for it.")
    return Verdict(
        "warning",
        f"The model has {board.model.size / 1e9:.1f} GB, but {disk.free / 1e9:.1f} GB are free on the disk.",
        "If it is there already, that is enough.",
        "df -h; or use another disk",
    )


CHECKS: Final[tuple[Check, ...]] = (
    bundle_platform,
    bundle_type,
    bundle_releases,
    bundle_memory,
    bundle_cores,
    bundle_disk,
)
