"""What all benchmarks share: runs in turns, spreads, aims and their outcomes, and the rows that are kept.

A benchmark makes a `Report`, adds rows, and returns `report.close()` from its `main`:

    report = Report("merge", __doc__, peers=PEERS, limits=LIMITS)
    runs = turns({"rkedge merge": merge, "cp -r": copy}, pairs())
    report.compare("until written", "s", {way: [run.wall_s for run in found] for way, found in runs.items()},
                   aims={"cp -r": at_most(1.5)})
    return report.close()

The first way of a comparison is ours. A ratio is taken of neighbours, ours divided by the peer's, because the speed of
a shared machine wanders; its median is judged, and only if there are `CLAIM` pairs of it. A missed aim makes the exit
status 1.
"""

from __future__ import annotations

import inspect
import json
import operator
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from tests.bench._machine import Moment, commit, machine

CLAIM = 10
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
RESULT_VARIABLE = "RKEDGE_BENCH_RESULT"  # the file that `python -m tests.bench` wants a module's rows in
PAIRS_VARIABLE = "RKEDGE_BENCH_PAIRS"

Run = TypeVar("Run")


def pairs() -> int:
    """How often each way is to run: CLAIM times, or as RKEDGE_BENCH_PAIRS says, for a quick look."""
    return int(os.environ.get(PAIRS_VARIABLE, CLAIM))


def turns(ways: Mapping[str, Callable[[], Run]], rounds: int, *, warm_up: bool = False) -> dict[str, list[Run]]:
    """Run each way once a round, A B A B ...; `warm_up` adds a round before the first that is thrown away."""
    if warm_up:
        for work in ways.values():
            work()
    found: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(work())
    return found


@dataclass(frozen=True)
class Spread:
    """What a series of values shows."""

    count: int
    median: float
    low: float
    quarter: float
    three_quarters: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """ValueError without a value."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values")
        if len(ordered) == 1:
            return cls(1, *ordered * 5)
        # "inclusive": within what was seen.
        quarter, middle, later = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(len(ordered), middle, ordered[0], quarter, later, ordered[-1])


@dataclass(frozen=True)
class Aim:
    """What a row's median should be."""

    relation: str  # "<=" or ">="
    value: float

    def met_by(self, value: float) -> bool:
        """Whether a median is good enough."""
        return bool({"<=": operator.le, ">=": operator.ge}[self.relation](value, self.value))

    def __str__(self) -> str:
        return f"{self.relation} {number(self.value)}"


def at_most(value: float) -> Aim:
    """The aim of what should be small."""
    return Aim("<=", value)


def at_least(value: float) -> Aim:
    """The aim of what should be large."""
    return Aim(">=", value)


@dataclass(frozen=True)
class Row:
    """A figure or a ratio of one benchmark, whose aim it is, and what came of that."""

    what: str
    who: str
    unit: str
    spread: Spread | None
    aim: str = ""
    outcome: str = ""
    note: str = ""


@dataclass
class Report:
    """The rows of one benchmark. `peers` tells how to set up what it compares with, `limits` what it does not show."""

    name: str
    about: str
    peers: str = ""
    limits: str = ""
    rows: list[Row] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    began: Moment = field(default_factory=Moment.now)

    def figure(
        self, what: str, who: str, values: Sequence[float] | float, unit: str, aim: Aim | None = None, note: str = ""
    ) -> Row:
        """Add a figure; it is judged whatever the number of values."""
        spread = Spread.of(values if isinstance(values, Sequence) else [values])
        outcome = _judged(aim, spread) if aim else ""
        return self._add(Row(what, who, unit, spread, str(aim or ""), outcome, note))

    def ratio(self, what: str, who: str, ours: Sequence[float], theirs: Sequence[float], aim: Aim | None = None) -> Row:
        """Add the ratio of neighbours, ours divided by theirs; ValueError if one has more values."""
        spread = Spread.of(our / their for our, their in zip(ours, theirs, strict=True))
        if spread.count < CLAIM:
            few = f"{spread.count} of {CLAIM} pairs: no claim"
            return self._add(Row(what, who, "x", spread, str(aim or ""), NOT_MEASURED if aim else "", few))
        return self._add(Row(what, who, "x", spread, str(aim or ""), _judged(aim, spread) if aim else ""))

    def compare(
        self,
        what: str,
        unit: str,
        ways: Mapping[str, Sequence[float]],
        *,
        aim: Aim | None = None,
        aims: Mapping[str, Aim] | None = None,
    ) -> None:
        """Add a figure for each way, and the ratio of the first, which is ours, to each other.

        `aim` is that of our figure; `aims` are those of ratios, by peer. An aim without its peer gets a row.
        """
        ours, *peers = ways
        self.figure(what, ours, ways[ours], unit, aim)
        wanted = dict(aims or {})
        for peer in peers:
            self.figure(what, peer, ways[peer], unit)
            self.ratio(what, f"{ours} / {peer}", ways[ours], ways[peer], wanted.pop(peer, None))
        for peer, missing in wanted.items():
            self.unmeasured(what, f"{ours} / {peer}", "x", missing, f"{peer} was not there")

    def unmeasured(self, what: str, who: str, unit: str, aim: Aim | None, why: str) -> Row:
        """Add what could not be measured here."""
        return self._add(Row(what, who, unit, None, str(aim or ""), NOT_MEASURED, why))

    def _add(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def close(self) -> int:
        """Print the rows and leave them for the page; the exit status."""
        for line in table(self.rows):
            print(line)
        missed = [row for row in self.rows if row.outcome == MISSED]
        for row in missed:
            print(f"missed: {row.what}, {row.who}: {shown(row.spread, row.unit)}, wanted {row.aim}")
        document = self.document()
        print(machine_line(document), flush=True)
        if path := os.environ.get(RESULT_VARIABLE):
            Path(path).write_text(json.dumps(document))
        return bool(missed)

    def document(self) -> dict[str, Any]:
        """Everything about this run, as it is kept."""
        return {
            "name": self.name,
            "about": inspect.cleandoc(self.about),
            "peers": inspect.cleandoc(self.peers),
            "limits": inspect.cleandoc(self.limits),
            "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "machine": machine(),
            "versions": self.versions,
            "load": self.began.load_until(Moment.now()),
            "rows": [asdict(row) for row in self.rows],
        }

    def version_of(self, *packages: str) -> None:
        """Note the releases of Python packages that took part."""
        self.versions |= {package: metadata.version(package) for package in packages}


def _judged(aim: Aim, spread: Spread) -> str:
    return MET if aim.met_by(spread.median) else MISSED


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shown(spread: Spread | None, unit: str) -> str:
    """The median with its unit."""
    return f"{number(spread.median)} {unit}".rstrip() if spread else "-"


def _range(low: float, high: float) -> str:
    return f"{number(low)} .. {number(high)}"


def cells(row: Row) -> list[str]:
    """A row's cells, under HEADINGS."""
    spread, several = row.spread, row.spread is not None and row.spread.count > 1
    return [
        row.what,
        row.who,
        shown(spread, row.unit),
        _range(spread.low, spread.high) if spread and several else "",
        _range(spread.quarter, spread.three_quarters) if spread and several else "",
        str(spread.count) if spread else "",
        row.aim,
        f"{row.outcome} ({row.note})" if row.outcome and row.note else row.outcome or row.note,
    ]


HEADINGS = ("what", "who", "median", "min .. max", "quartiles", "n", "aim", "outcome")


def table(rows: Iterable[Row]) -> Iterable[str]:
    """Lines of a table for a terminal."""
    lines = [list(HEADINGS), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def machine_line(document: Mapping[str, Any]) -> str:
    """Where a benchmark ran, and beside what."""
    on, load = document["machine"], document["load"]
    return (
        f"{on['processor']}, {on['cpus']} CPUs, {on['memory_gb']} GB, {on['system']}, Python {on['python']}; "
        f"other work kept {load['others_cpus']} CPUs busy, the host took {load['stolen_cpus']}"
    )
