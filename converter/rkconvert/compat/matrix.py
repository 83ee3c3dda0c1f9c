"""Fill the matrix: for each cell, what every source says, the most trusted first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rkconvert.compat import predicted, reported, rknn, vendor
from rkconvert.compat.case import Case
from rkconvert.compat.cells import Cell, Evidence, Judged
from rkconvert.compat.results import Results, shipped_folder

Source: TypeAlias = Callable[[Case, Cell], Iterator[Evidence]]
# Sources that need nothing but what comes with RKEdge.
SOURCES: tuple[Source, ...] = (vendor.figures, vendor.toolkit, rknn.blocks, reported.reports, predicted.sizes)


@dataclass(frozen=True)
class Matrix:
    """A model's cells, judged."""

    case: Case
    cells: tuple[Judged, ...]


def known(case: Case, cell: Cell) -> str:
    """Return the most trusted answer for a cell in one sentence, without the emulator; empty if there is none."""
    judged = fill(case, [cell], [Results([shipped_folder()])]).cells[0]
    if judged.deciding is None:
        return ""
    piece = judged.deciding
    where = f"{cell.type} on {cell.soc} with RKLLM {cell.release}"
    return f"{where}: {judged.status.value} ({piece.level.value}): {piece.says} {piece.source}"


def fill(case: Case, cells: Sequence[Cell], more: Sequence[Source] = ()) -> Matrix:
    """Ask SOURCES and `more` about each cell."""
    sources = (*SOURCES, *more)
    return Matrix(case, tuple(Judged.of(cell, [item for ask in sources for item in ask(case, cell)]) for cell in cells))
