"""docs/benchmarks.json and docs/benchmarks.md: what benchmarks found, each with its machine and the load there."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.bench._machine import ROOT
from tests.bench._report import CLAIM, HEADINGS, MET, MISSED, NOT_MEASURED, Row, Spread, cells, machine_line

FIGURES = ROOT / "docs" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
_NOTE = "<!-- Written by `make bench`; do not edit. -->"
_INTRODUCTION = f"""
`make bench` measures speed and memory, and writes this page and [benchmarks.json](benchmarks.json), which has the same
figures. A missed aim makes it fail. `.venv/bin/python -m tests.bench merge` runs one alone and replaces its section.

* What is compared runs in turns, A B A B ..., on the same machine in the same minutes. A ratio is taken of neighbours,
  ours divided by the other's; the table has its median, its extremes and its quartiles over `n` pairs. Under {CLAIM}
  pairs it is no claim, and an aim counts as not measured.
* An aim is judged by the median. A peer that was not set up is a row without a figure.
* Each section has the date, the commit (a + stands for changes to it), the machine, and how many of its CPUs other work
  kept busy meanwhile; servers that were set up as peers count as such. Where that is much, trust ratios, not figures.
* All of this was measured on a computer and none of it on a board: it shows what this program costs, not what an NPU
  does.
"""


def collect(found: Mapping[str, dict[str, Any]], known: Iterable[str]) -> None:
    """Put the runs of some benchmarks in the place of their former ones, and write both files anew."""
    former: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    everything = {name: one for name, one in sorted((former | dict(found)).items()) if name in set(known)}
    _replace(FIGURES, json.dumps(everything, indent=1) + "\n")
    _replace(PAGE, "\n".join(page(everything)) + "\n")


def _replace(path: Path, text: str) -> None:
    """A page that was cut off would stand there as if it was all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


def benchmarks() -> list[str]:
    """The names of all benchmarks."""
    return [one.name for one in pkgutil.iter_modules([str(Path(__file__).parent)]) if not one.name.startswith("_")]


def page(found: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """The lines of the page."""
    yield f"# How fast is it, and compared to what?\n\n{_NOTE}\n{_INTRODUCTION}"
    outcomes = [row["outcome"] for one in found.values() for row in one["rows"]]
    met, missed, absent = (outcomes.count(outcome) for outcome in (MET, MISSED, NOT_MEASURED))
    yield f"Of {met + missed + absent} aims, {met} were met, {missed} missed and {absent} not measured."
    if without := [name for name in benchmarks() if name not in found]:
        yield f"\nThese have not been run to their end yet: {', '.join(without)}."
    for name, one in found.items():
        yield from _section(name, one)


def _section(name: str, one: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n## {name}\n\n{one['about']}\n"
    yield f"{one['when']}, commit {one['commit'] or 'unknown'}. {machine_line(one)}, in {one['load']['seconds']} s."
    if one["versions"]:
        yield f"Versions: {', '.join(f'{what} {version}' for what, version in one['versions'].items())}."
    yield f"\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}"
    for row in one["rows"]:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells(row_of(row)))} |"
    for title, text in (("Peers", one["peers"]), ("What this does not show", one["limits"])):
        if text:
            yield f"\n**{title}.** {text}"


def row_of(kept: Mapping[str, Any]) -> Row:
    """A row as it is kept."""
    return Row(**{**kept, "spread": Spread(**kept["spread"]) if kept["spread"] else None})
