"""A result as a file of the schema rkedge-compat/1 (docs/compat.md), so that `rkedge compat` takes it as evidence.

Its `bench` has the lines of the table and what the board did meanwhile. A board's answer is hostile input until
`Result.parse` has checked it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal

from rkruntime.errors import ServiceError
from rkruntime.evidence import SCHEMA, Record
from rkruntime.schema import Between, Length, build

BENCH_SCHEMA: Final = "rkedge-bench/1"
_MOST_LINES: Final = 1000

_Name = Annotated[str, Length(200)]
_Text = Annotated[str, Length(500)]
_Count = Annotated[int, Between(0, 1 << 48)]
_Figure = Annotated[float, Between(0, 1e12)]
_Degrees = Annotated[float, Between(-300, 1000)]


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        unit: `t/s`, `ms`, `s` or `MiB`.
        values: One for each repetition; empty if there is a `problem`.
        plan, vendor: The expected figures, in the same unit.
    """

    test: _Name
    unit: Literal["t/s", "ms", "s", "MiB"]
    values: tuple[_Figure, ...] = ()
    mean: _Figure = 0.0
    deviation: _Figure = 0.0
    plan: _Figure | None = None
    vendor: _Figure | None = None
    problem: _Text = ""


@dataclass(frozen=True)
class ClockFacts:
    """A clock, in Hz; see rkboard.doctor.readings.Clock."""

    name: _Name
    governor: _Name | None
    now: _Count | None
    least: _Count | None
    most: _Count | None
    best: _Count | None


@dataclass(frozen=True)
class Moment:
    """The board before or after the measurement; temperatures in degrees Celsius."""

    clocks: tuple[ClockFacts, ...] = ()
    temperatures: dict[str, _Degrees] = field(default_factory=dict)
    cooling: dict[str, _Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """The table and its circumstances.

    Attributes:
        changes: Changes on the board meanwhile, because of which the figures are not those of a steady board.
        complete: Whether everything that was asked for was measured.
        error: The error that ended the measurement early.
    """

    schema: Literal["rkedge-bench/1"]
    repetitions: Annotated[int, Between(1, 1000)]
    family: _Name
    size: _Name
    parameters: _Count
    file_bytes: _Count
    plan_title: _Name
    vendor_title: _Name
    lines: tuple[Line, ...]
    notes: tuple[_Text, ...]
    changes: tuple[_Text, ...]
    before: Moment
    after: Moment
    hottest: _Degrees | None = None
    complete: bool = True
    error: _Text = ""


@dataclass(frozen=True)
class Result(Record):
    """The whole result."""

    bench: Bench

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, text: bytes) -> Result:
        """Read the result that a board has sent. Raises ServiceError for anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise _nonsense("something other than a result")
        found = build(cls, data, lambda what: _nonsense(f"a result in which {what}"))
        if len(found.bench.lines) > _MOST_LINES or len(found.runs) > _MOST_LINES:
            raise _nonsense("a result that is too long")
        if not found.runs:
            raise _nonsense("a result with no run in it")
        return found


def _nonsense(what: str) -> ServiceError:
    return ServiceError(
        f"The board sent {what}.", hint="The same release of rkedge has to be on both machines: rkedge -V"
    )
