"""Events of a running conversion: from the worker's lines, strictly checked, and from its output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from rkruntime.errors import ToolkitError
from rkruntime.schema import build

MAX_LINE: Final = 1 << 20
StageName: TypeAlias = Literal["import", "load", "build", "export", "verify"]


@dataclass(frozen=True)
class WorkerStarted:
    """The worker started. `python` is its release, `pid` its process ID."""

    python: str
    pid: int


@dataclass(frozen=True)
class Stage:
    """A step started."""

    stage: StageName


@dataclass(frozen=True)
class StageDone:
    """A step returned; `seconds` is wall-clock time."""

    stage: StageName
    seconds: float


@dataclass(frozen=True)
class Done:
    """All steps returned 0. The runner checks what they wrote."""


@dataclass(frozen=True)
class Failure:
    """The worker gave up.

    Attributes:
        kind: `job` (not understood), `import`, `argument` (the installed method does not take it), `exception`, `exit`
            or `returned` (the toolkit's -1).
        message: Text for the user; `trace` is Python's traceback, if any.
    """

    kind: str
    stage: str
    message: str
    trace: str = ""


@dataclass(frozen=True)
class Progress:
    """A progress bar in the toolkit's output: `done` of `total`, for the work that `title` names."""

    title: str
    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """A message of the toolkit: `level` is `info`, `warning` or `error`."""

    level: str
    text: str


@dataclass(frozen=True)
class Heartbeat:
    """The worker is alive: seconds since its start, and its peak memory in bytes."""

    seconds: float
    peak_memory: int


WorkerEvent: TypeAlias = WorkerStarted | Stage | StageDone | Done | Failure
Event: TypeAlias = WorkerEvent | Progress | Notice | Heartbeat

# The worker's own events, by the value of `event`.
_KINDS: Final[dict[str, type[WorkerEvent]]] = {
    "started": WorkerStarted,
    "stage": Stage,
    "stage_done": StageDone,
    "done": Done,
    "failure": Failure,
}


def parse_event(line: bytes) -> WorkerEvent:
    """Parse one line of the worker. Raises ToolkitError for anything unexpected."""
    try:
        data = json.loads(line)
        kind = _KINDS[data.pop("event")]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:  # not JSON, or not an event
        raise _protocol(line) from error
    return build(kind, data, lambda _: _protocol(line))


def _protocol(line: bytes) -> ToolkitError:
    shown = line[:200].decode("utf-8", "replace")
    return ToolkitError(
        f"The toolkit's worker reported something that RKEdge does not understand: {shown!r}.",
        hint="Something in the toolkit's environment writes to the worker's own channel. Run `rkedge toolkit setup`.",
    )
