"""What the board does during a measurement: clocks, governors, temperatures, and throttling for heat."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rkboard.doctor.readings import Clock, clocks, cooling, mhz, temperatures
from rkboard.doctor.visit import glance
from rkruntime.checks.machine import ROOT
from rkruntime.errors import RKEdgeError

_EVERY_S: Final = 2.0
_MOST_ZONES: Final = 32


@dataclass(frozen=True)
class Moment:
    """The board at one moment."""

    clocks: tuple[Clock, ...]
    temperatures: dict[str, float]
    cooling: dict[str, int]

    @classmethod
    def now(cls, root: Path) -> Moment:
        """Look at the board."""
        board = glance(root, clocks_only=True)
        return cls(tuple(clocks(board)), temperatures(board), cooling(board))

    @property
    def hottest(self) -> float | None:
        """The highest temperature, in degrees Celsius; None if none can be read."""
        return max(self.temperatures.values(), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return the moment for JSON; clocks in Hz."""
        kept = ("name", "governor", "now", "least", "most", "best")
        return {
            "clocks": [{name: value for name, value in asdict(one).items() if name in kept} for one in self.clocks],
            "temperatures": dict(list(self.temperatures.items())[:_MOST_ZONES]),
            "cooling": dict(list(self.cooling.items())[:_MOST_ZONES]),
        }


@dataclass
class Watch:
    """Looks at the board every other second while its block runs.

    Attributes:
        before, after: The board at the start and at the end.
        hottest: The highest temperature in between.
    """

    root: Path = ROOT
    before: Moment = field(init=False)
    after: Moment = field(init=False)
    hottest: float | None = None

    def __post_init__(self) -> None:
        self.before = self.after = Moment.now(self.root)
        self._said: dict[str, None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Watch:
        self._see(self.before)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = Moment.now(self.root)
        self._see(self.after)

    @property
    def changes(self) -> list[str]:
        """The changes because of which the figures are not those of a steady board; empty for a steady one."""
        return list(self._said)

    def _follow(self) -> None:
        while not self._stop.wait(_EVERY_S):
            with suppress(RKEdgeError, OSError):
                self._see(Moment.now(self.root))

    def _see(self, moment: Moment) -> None:
        if moment.hottest is not None:
            self.hottest = max(moment.hottest, -273.0 if self.hottest is None else self.hottest)
        for text in _differences(self.before, moment):
            self._said.setdefault(text)


def _differences(before: Moment, now: Moment) -> Iterator[str]:
    """Yield how a moment differs from the first one, in words that are the same each time."""
    for name, steps in now.cooling.items():
        if steps:
            yield f"the kernel lowered clocks for heat ({name})"
    then = {clock.name: clock for clock in before.clocks}
    for clock in now.clocks:
        first = then.get(clock.name)
        if first is None or clock == first:
            continue
        if clock.governor != first.governor:
            yield f"the governor of {clock.name} changed from {first.governor} to {clock.governor}"
        elif clock.most != first.most:
            yield f"the limit of {clock.name} changed from {mhz(first.most)} to {mhz(clock.most)}"
        elif first.held and clock.now != first.now:
            yield f"{clock.name} was not always at {mhz(first.now)}"
    for name in then.keys() - {clock.name for clock in now.clocks}:
        yield f"{name} can no longer be read"
