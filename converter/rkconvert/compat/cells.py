"""Cells of the matrix, the evidence on them, and what it adds up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Final, Literal, TypeAlias

LoraMode: TypeAlias = Literal["merged", "runtime"]


class Status(str, Enum):
    """The outcome for a model in a cell."""

    WORKS = "works"
    SLOWER = "works but slower"
    REFUSED = "refused by the toolkit"
    FAILS = "fails at load"
    WRONG = "wrong answers"
    UNKNOWN = "unknown"

    @property
    def loads(self) -> bool:
        """Whether the model loads, whatever it answers and however fast."""
        return self in (Status.WORKS, Status.SLOWER, Status.WRONG)


class Level(str, Enum):
    """Where evidence comes from, the most trusted first."""

    BOARD = "measured on a board"
    FIGURE = "vendor figure"
    TOOL = "vendor tool"
    REPORTED = "reported"
    EMULATED = "emulated"
    PREDICTED = "predicted"


TRUST: Final = tuple(Level)
# A type is called slower if another one that the same SoC takes has more than 1 / 0.9 of its speed.
AS_FAST: Final = 0.9


@dataclass(frozen=True, order=True)
class Cell:
    """One combination. `release` is that of toolkit and runtime, `context` in tokens."""

    soc: str
    release: str
    type: str
    cores: int
    context: int
    lora: LoraMode

    @property
    def asked(self) -> str:
        """The options of `rkedge compat` that ask for it."""
        return (
            f"--platform {self.soc} --release {self.release} --dtype {self.type} --cores {self.cores}"
            f" --max-context {self.context} --adapter {self.lora}"
        )


@dataclass(frozen=True)
class Evidence:
    """What one source says about a cell.

    Attributes:
        says: A sentence.
        source: Where that is known from; an address where there is one.
        partial: Whether this is about one aspect only, such as NPU memory, so that WORKS is not yet an answer.
        log: Lines that were printed.
    """

    status: Status
    level: Level
    says: str
    source: str
    partial: bool = False
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A cell with all evidence on it, the most trusted first. Nothing is averaged."""

    cell: Cell
    evidence: tuple[Evidence, ...]

    @classmethod
    def of(cls, cell: Cell, evidence: Sequence[Evidence]) -> Judged:
        """Sort by trust; of two pieces with the same level, the first comes first."""
        return cls(cell, tuple(sorted(evidence, key=lambda item: TRUST.index(item.level))))

    @property
    def deciding(self) -> Evidence | None:
        """The most trusted evidence that is an answer: any failure, or success that is not partial."""
        answers = (item for item in self.evidence if not (item.partial and item.status.loads))
        return next(answers, None)

    @property
    def status(self) -> Status:
        """The status of the deciding evidence."""
        return self.deciding.status if self.deciding else Status.UNKNOWN

    @property
    def level(self) -> Level | None:
        """The level of the deciding evidence; None without any."""
        return self.deciding.level if self.deciding else None

    @cached_property
    def disputed(self) -> frozenset[Evidence]:
        """Evidence that contradicts the deciding one: on whether the model loads, or whether its answers are right."""
        one = self.deciding
        return frozenset(item for item in self.evidence if one and _contradict(one, item))


def _contradict(one: Evidence, other: Evidence) -> bool:
    # Sizes and the emulator know nothing about which types a toolkit accepts.
    if Status.REFUSED in (one.status, other.status) and {one.level, other.level} & {Level.EMULATED, Level.PREDICTED}:
        return False
    if one.status.loads != other.status.loads:
        loading = one if one.status.loads else other
        return not loading.partial
    return Status.WRONG in (one.status, other.status) and one.status != other.status and not other.partial
