"""What a user wants of the clocks, and the values that this means among those that the chip lists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from rkboard.doctor.document import Board
from rkboard.doctor.readings import STAYING, Clock, Kind, clocks, mhz
from rkruntime.checks.keeper import SCHEMA
from rkruntime.errors import RefusedError, UsageError
from rkruntime.schema import Length

AUTO: Final = "auto"
MAX: Final = "max"
KEEP: Final = "keep"
GOVERNOR: Final = "userspace"
_VALUE: Final = re.compile(r"auto|max|keep|\d{2,5}", re.ASCII)
_KINDS: Final[dict[Kind, str]] = {"cpu": "the CPU's clocks", "npu": "the NPU's clock", "ddr": "the memory's clock"}
_FROZEN: Final = (
    "https://github.com/antonioacg/rknpu-rk3588/blob/deaea9e/docs/porting-journal.md"
    "#known-issue-devfreq-userspace-governor-hangs-the-board"
)

_Word = Annotated[str, Length(16)]


@dataclass(frozen=True)
class Wish:
    """For each kind of clock `max`, a number of MHz, `keep`, or `auto` (the maximum, where the kernel controls it).

    Raises:
        UsageError: A value is something else.
    """

    schema: Annotated[str, Length(64)] = SCHEMA
    cpu: _Word = AUTO
    npu: _Word = AUTO
    ddr: _Word = AUTO
    restore: bool = False

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise UsageError("The request is from another release of rkedge.", hint="Install one on both sides.")
        for kind in _KINDS:
            if not _VALUE.fullmatch(self.of(kind)):
                raise UsageError(f"{self.of(kind)!r} is not a clock: give MHz, max or keep.")

    def of(self, kind: Kind) -> str:
        """Return what is wanted of a kind of clock."""
        value: str = getattr(self, kind)
        return value


@dataclass(frozen=True)
class Goal:
    """A clock, and the value to hold it at, in Hz."""

    clock: Clock
    hertz: int

    @property
    def before(self) -> int | None:
        """The value to put back afterwards: the one that the chip lists nearest to the present one."""
        now = self.clock.now
        return None if now is None else min(self.clock.listed, key=lambda value: abs(value - now), default=None)


def goals(board: Board, wish: Wish) -> tuple[list[Goal], list[str]]:
    """Return the value to hold each clock at, and notes for the user.

    Raises:
        RefusedError: A value could do harm, could not be checked afterwards, or is not one that the chip lists.
    """
    found, notes = clocks(board), list[str]()
    chosen = []
    for kind, words in _KINDS.items():
        wanted, those = wish.of(kind), [clock for clock in found if clock.kind == kind]
        if wanted == KEEP:
            continue
        if kind == "npu":
            _check_npu(board, those)
        if not those and wanted == AUTO:
            notes.append(f"The kernel does not control {words}: nothing is changed there.")
        elif not those:
            raise RefusedError(
                f"The kernel does not control {words}.", hint="docs/images.md: kernels and what they have."
            )
        for clock in those:
            _check(clock)
            chosen.append(Goal(clock, _value(clock, wanted)))
    return chosen, [*notes, *_limited(chosen, wish)]


def _check_npu(board: Board, those: Sequence[Clock]) -> None:
    if those and not board.npu_clock_is_safe:
        raise RefusedError(
            f"The NPU's driver is not one of the vendor's kernel ({board.release or 'unknown'}), and writing the"
            f" NPU's clock froze a board with such a one ({_FROZEN}).",
            hint="Name the clocks that may be set: --cpu max. For the NPU's full clock boot the vendor's kernel:"
            " docs/images.md",
        )


def _check(clock: Clock) -> None:
    """Raise RefusedError unless the clock can be set and read back."""
    said = {
        "its value": clock.now,
        "its governor": clock.governor,
        "the values that the chip lists": clock.listed,
    }
    missing = [name for name, value in said.items() if not value]
    if missing:
        raise RefusedError(
            f"The clock {clock.name} is not set, as /{clock.folder} does not say {' and '.join(missing)}.",
            hint="What cannot be read back is not written. `rkedge doctor` says more about the clocks.",
        )
    if GOVERNOR not in clock.governors:
        listed = ", ".join(clock.governors) or "nothing"
        raise RefusedError(
            f"The clock {clock.name} cannot be set: the kernel lists {listed}, but not the governor {GOVERNOR}.",
            hint="`rkedge doctor --fix` offers the governor performance where there is one.",
        )


def _value(clock: Clock, wanted: str) -> int:
    least, most = clock.least or 0, clock.most if clock.most is not None else clock.listed[-1]
    allowed = [value for value in clock.listed if least <= value <= most]
    fitting = allowed[-1:] if wanted in (AUTO, MAX) else [one for one in allowed if round(one / 1e6) == int(wanted)]
    if fitting:
        return fitting[0]
    listed = ", ".join(f"{value / 1e6:.0f}" for value in allowed) or "none"
    what = "has no such value within its limits" if wanted in (AUTO, MAX) else f"cannot be {wanted} MHz"
    raise RefusedError(
        f"The clock {clock.name} {what}.",
        hint=f"Within its limits the chip lists, in MHz: {listed}",
    )


def _limited(chosen: Sequence[Goal], wish: Wish) -> Iterator[str]:
    for goal in chosen:
        clock = goal.clock
        if wish.of(clock.kind) in (AUTO, MAX) and goal.hertz < (clock.best or 0):
            yield f"{clock.name} is limited to {mhz(clock.most)}; the chip could do {mhz(clock.best)}."
        if clock.governor in STAYING and goal.before != clock.now:
            yield (
                f"{clock.name} is at {mhz(clock.now)}, which the chip does not list;"
                f" afterwards it is put to the nearest that it does, {mhz(goal.before)}."
            )
