"""What sizes and the vendor's figures for other models imply: the weakest evidence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rkconvert.compat.case import Case
from rkconvert.compat.cells import AS_FAST, Cell, Evidence, Level, Status
from rkconvert.plan.boards import find_board
from rkconvert.plan.sizing import Sizing, embedding_place
from rkconvert.rules.quantized_types import accepted
from rkconvert.rules.releases import release
from rkconvert.rules.type_names import parse_type

_SOURCE: Final = "rkedge plan: sizes of weights and cache, fitted to the vendor's figures for other models"


def sizes(case: Case, cell: Cell) -> Iterator[Evidence]:
    """Whether it fits the largest board with this SoC, and how fast it is beside the other types."""
    if cell.type not in accepted(cell.soc, cell.release):
        return
    sizing = Sizing(case.shape, find_board(cell.soc), cell.release, cell.context, embedding_place(cell.release, None))
    kind = parse_type(cell.type)
    problem = sizing.problem(kind)
    if problem:
        yield Evidence(Status.FAILS, Level.PREDICTED, f"{problem[0].upper()}{problem[1:]}.", _SOURCE)
        return
    speeds = {name: sizing.speed(parse_type(name)) for name in accepted(cell.soc, cell.release)}
    best = max(speeds, key=lambda name: speeds[name])
    slower = speeds[cell.type] < AS_FAST * speeds[best]
    beside = f", against {speeds[best]:.1f} with {best}" if slower else ""
    few = "" if cell.cores == release(cell.release).cores[cell.soc] else " with all cores"
    adapter = "" if cell.lora == "merged" else " An adapter's own memory and time are not in this."
    yield Evidence(
        Status.SLOWER if slower else Status.WORKS,
        Level.PREDICTED,
        f"{sizing.memory(kind, cell.context) / 1e9:.1f} GB of memory,"
        f" {speeds[cell.type]:.1f} tokens/s{few}{beside}.{adapter}",
        _SOURCE,
    )
