"""What people report about types for models of this size and family: reports.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rkconvert.compat.case import Case
from rkconvert.compat.cells import Cell, Evidence, Level, Status


@dataclass(frozen=True)
class Report:
    """A row of reports.yaml: what it is about, and what happened. A field that is left out matches everything."""

    status: Status
    says: str
    source: str
    log: tuple[str, ...] = ()
    soc: str = ""
    types: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    family: str = ""
    parameters: tuple[float, float] = (0, math.inf)

    def about(self, case: Case, cell: Cell) -> bool:
        """Whether the report is about this model in this cell."""
        shape = case.shape
        return (
            self.soc in ("", cell.soc)
            and cell.type in (self.types or (cell.type,))
            and cell.release in (self.releases or (cell.release,))
            and self.family in ("", shape.family)
            and self.parameters[0] <= shape.parameters < self.parameters[1]
        )


@cache
def _reports() -> tuple[Report, ...]:
    rows: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("reports.yaml").read_text("utf-8"))
    lists = ("log", "types", "releases", "parameters")
    return tuple(
        Report(**{**row, **{key: tuple(row[key]) for key in lists if key in row}, "status": Status(row["status"])})
        for row in rows
    )


def reports(case: Case, cell: Cell) -> Iterator[Evidence]:
    """Yield each report about this model, type, SoC and release. None is about an adapter beside the model."""
    for report in _reports():
        if cell.lora == "merged" and report.about(case, cell):
            yield Evidence(report.status, Level.REPORTED, report.says, report.source, log=report.log)
