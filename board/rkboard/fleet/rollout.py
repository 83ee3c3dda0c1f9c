"""The same work on many boards: first on one, then on the rest in parallel, until one of them fails.

Not with pyinfra (docs/fleet.md says why): all work on a board is done by one session over the user's own ssh, so that
all that is left to do here is to start several sessions and to stop in time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from rkboard.fleet.inventory import Entry
from rkruntime.defects import typed
from rkruntime.errors import HostError, RKEdgeError

State = Literal["done", "nothing to do", "failed", "not touched"]
# Of a board whose work nobody waits for any more; it may go on there.
_INTERRUPTED: Final = HostError(
    "It was interrupted, and may have changed something.",
    hint="Start the same command again: it finishes what is left.",
)
Work = Callable[[Entry], Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """The outcome for a board. `facts`: what the work returned; `error`: why it failed."""

    entry: Entry
    state: State
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: RKEdgeError | None = None

    @property
    def as_looked_at(self) -> Outcome:
        """The outcome of work that was only a look: `not touched` if its facts have `changes` to make."""
        return (
            self if self.error else replace(self, state="not touched" if self.facts.get("changes") else "nothing to do")
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome for JSON."""
        named = {"board": self.entry.name, "group": self.entry.group, "destination": self.entry.destination}
        return {**named, "state": self.state, **self.facts, **(self.error.as_dict() if self.error else {})}


class Rollout:
    """Runs the same work on boards.

    Args:
        work: The work on one board; called from several threads at the same time.
        at_once: The number of boards to work on in parallel.
        careful: Begin with one board alone, and begin with no further one after a failure.

    Attributes:
        outcomes: The outcome of each board, in their order; `not touched` where nothing was begun.
    """

    def __init__(self, boards: Sequence[Entry], work: Work, at_once: int, *, careful: bool) -> None:
        self._boards, self._work, self._at_once, self._careful = boards, work, at_once, careful
        self._stopped = threading.Event()
        self._begun: set[str] = set()
        self._found: dict[str, Outcome] = {}

    @property
    def outcomes(self) -> list[Outcome]:
        """See the class. What was begun and has not ended was interrupted."""
        return [self._found.get(one.name) or self._without(one) for one in self._boards]

    def _without(self, entry: Entry) -> Outcome:
        return (
            Outcome(entry, "failed", error=_INTERRUPTED) if entry.name in self._begun else Outcome(entry, "not touched")
        )

    def run(self) -> list[Outcome]:
        """Do the work; return the outcomes. Ctrl-C raises KeyboardInterrupt once the boards in progress are done."""
        first = 1 if self._careful else 0
        for entry in self._boards[:first]:
            self._one(entry)
        with ThreadPoolExecutor(self._at_once) as pool:
            try:
                list(pool.map(self._one, self._boards[first:]))
            except BaseException:  # Ctrl-C too: no further board may begin
                self._stopped.set()
                raise
        return self.outcomes

    def _one(self, entry: Entry) -> None:
        if self._stopped.is_set():
            return
        self._begun.add(entry.name)
        try:
            self._found[entry.name] = Outcome(entry, "done", self._work(entry))
        except Exception as error:  # whatever it is, it belongs into this board's outcome
            self._found[entry.name] = Outcome(entry, "failed", error=typed(error))
            if self._careful:
                self._stopped.set()
