"""What the vendor's other converter, rknn-toolkit2, makes of the blocks of a Gemma 2: rknn.yaml, measured on a PC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from rkconvert.compat.case import Case
from rkconvert.compat.cells import Cell, Evidence, Level, Status

_FAMILY: Final = "gemma2"
_SOURCE: Final = "rknn.yaml, made with https://pypi.org/project/rknn-toolkit2/; its simulator, not a board"


@cache
def measured() -> Mapping[str, Any]:
    """Return rknn.yaml: `tool` with its version, and `rows` as tests/rknn/measure.py describes them."""
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("rknn.yaml").read_text("utf-8"))
    return content


def blocks(case: Case, cell: Cell) -> Iterator[Evidence]:
    """Yield whether the tool takes the blocks with this type, and how near to float it computes; nothing for groups."""
    rows = [row for row in measured()["rows"] if (row["soc"], row["type"]) == (cell.soc, cell.type)]
    if case.shape.family != _FAMILY or not rows:
        return
    tool, refused = measured()["tool"], [row for row in rows if "words" in row]
    if refused:
        says = f"{tool} refuses {len(refused)} of {len(rows)} blocks: {refused[0]['words']}"
        yield Evidence(Status.REFUSED, Level.TOOL, says, _SOURCE, log=(refused[0]["words"],))
        return
    says = f"{tool} builds all {len(rows)} blocks; cosine to float {_range(rows, 'vendor')}{_beside(rows)}."
    yield Evidence(Status.WORKS, Level.TOOL, says, _SOURCE, partial=True)


def _beside(rows: Sequence[Mapping[str, Any]]) -> str:
    return f", of the emulator's arithmetic {_range(rows, 'ours')}" if "ours" in rows[0] else ""


def _range(rows: Sequence[Mapping[str, Any]], whose: str) -> str:
    found = [row[whose][0] for row in rows]
    return f"{min(found):.5f} to {max(found):.5f}"
