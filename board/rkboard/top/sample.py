"""What a board does at the moment, from two documents of the probe some time apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rkboard.doctor.document import Board
from rkboard.doctor.probe import METRICS, SOCKET
from rkboard.doctor.readings import Clock, clocks, cooling, temperatures
from rkruntime.checks.machine import NPU_LOAD, Memory, memory, npu_load

SCHEMA: Final = "rkedge-top/1"
_DAEMON: Final = SOCKET.lstrip("/")
_MOST_WORD: Final = 100
_MOST_ZONES: Final = 16
_MOST_COUNT: Final = 10**12
_BEGUN: Final = "rkedge_answer_tokens"
_GENERATED: Final = "rkedge_generated_tokens_total"


@dataclass(frozen=True)
class Daemon:
    """The daemon's state. A field is None or empty if the daemon does not tell it.

    Attributes:
        tokens_per_s: The rate since the sample before.
        busy, waiting: The number of requests being answered, and of those in the queue.
    """

    state: str
    model: str
    emulated: bool | None
    tokens_per_s: float | None
    busy: int | None
    waiting: int | None


@dataclass(frozen=True)
class Sample:
    """A board at one moment. `unknown`: the reason why a value is missing, by the value's name."""

    board: str
    kernel: str
    npu_load: dict[str, float]
    clocks: tuple[Clock, ...]
    temperatures: dict[str, float]
    cooling: dict[str, int]
    memory: Memory | None
    daemon: Daemon | None
    unknown: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, now: Board, before: Board | None = None) -> Sample:
        """Make a sample from the present look and the one before, which rates need."""
        zones, lowered = temperatures(now), cooling(now)
        return cls(
            board=(now.text("proc/device-tree/model") or "").strip("\0")[:_MOST_WORD],
            kernel=now.release[:_MOST_WORD],
            npu_load=npu_load(now.root),
            clocks=tuple(clocks(now)),
            temperatures={name: zones[name] for name in list(zones)[:_MOST_ZONES]},
            cooling={name: lowered[name] for name in list(lowered)[:_MOST_ZONES]},
            memory=memory(now.root),
            daemon=_daemon(now, before),
            unknown=dict(_unknown(now, before)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the sample for JSON; clocks in Hz, memory in bytes."""
        kept = ("name", "governor", "now", "least", "most", "best")
        whole = {"schema": SCHEMA, **asdict(self)}
        whole["clocks"] = [{name: asdict(one)[name] for name in kept} for one in self.clocks]
        return whole


def _daemon(now: Board, before: Board | None) -> Daemon | None:
    said = now.mapping(_DAEMON)
    if not said:
        return None
    queue = said.get("queue")
    waiting = _count(queue.get("waiting")) if isinstance(queue, dict) else None
    busy = queue.get("busy") if isinstance(queue, dict) else None
    emulated = said.get("emulated")
    return Daemon(
        state=_word(said.get("state")),
        model=_word(said.get("model")),
        emulated=emulated if isinstance(emulated, bool) else None,
        tokens_per_s=_rate(now, before) if before else None,
        busy=int(busy) if isinstance(busy, bool) else None,
        waiting=waiting,
    )


def _rate(now: Board, before: Board) -> float | None:
    """Return tokens/s between two looks by the daemon's own clock; None if it does not tell them or was restarted."""
    counts, times = [_tokens(board) for board in (before, now)], [_uptime(board) for board in (before, now)]
    if None in counts or None in times:
        return None
    seconds = (times[1] or 0.0) - (times[0] or 0.0)
    # Not below 0: the tokens of an answer that was broken off leave the count again.
    return max(0.0, (counts[1] or 0.0) - (counts[0] or 0.0)) / seconds if seconds > 0 else None


def _tokens(board: Board) -> float | None:
    """Return how many tokens the daemon has generated since its start; None if it does not tell."""
    text = board.text(METRICS) or ""
    found = dict(re.findall(r"^(rkedge_\w{1,40}) ([0-9.e+]{1,24})\r?$", text, re.MULTILINE | re.ASCII))
    if _GENERATED not in found:
        return None
    try:
        count = float(found[_GENERATED]) + float(found.get(_BEGUN, "0"))
    except ValueError:
        return None
    return count if count < _MOST_COUNT else None


def _uptime(board: Board) -> float | None:
    found = board.mapping(_DAEMON).get("uptime_s")
    return found if isinstance(found, float) and math.isfinite(found) else None


def _word(value: object) -> str:
    return value[:_MOST_WORD] if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST_COUNT else None


def _unknown(now: Board, before: Board | None) -> Iterator[tuple[str, str]]:
    """Yield the missing values with the reason for each."""
    if not npu_load(now.root):
        yield "npu_load", _no_load(now)
    kinds = {clock.kind for clock in clocks(now)}
    yield from (
        (f"clock {kind}", "the kernel does not control it") for kind in ("cpu", "npu", "ddr") if kind not in kinds
    )
    yield from ((f"clock {clock.name}", "its file cannot be read") for clock in clocks(now) if clock.now is None)
    if not temperatures(now):
        yield "temperature", "there is no thermal zone that can be read"
    if memory(now.root) is None:
        yield "memory", "/proc/meminfo cannot be read"
    if not now.mapping(_DAEMON):
        yield "daemon", _no_daemon(now)
    elif before and _rate(now, before) is None:
        yield "tokens/s", "the daemon was restarted, or is of an rkedge that does not count them"


def _no_load(board: Board) -> str:
    if any(board.closed(path) for path in NPU_LOAD):
        return "only root may read /sys/kernel/debug/rknpu/load: --sudo looks as root"
    if any(board.text(path) is not None for path in NPU_LOAD):
        return "the driver says something that is not known"
    return "the kernel has no rknpu driver that shows it, or debugfs is not mounted"


def _no_daemon(board: Board) -> str:
    error = board.error(_DAEMON)
    if error in ("EACCES", "EPERM"):
        return "this account is not in the group rkedge: --sudo looks as root"
    if error:
        return f"it does not answer ({error[:_MOST_WORD]})"
    if board.text(_DAEMON) is not None:
        return "it answers with something that is not its state"
    return f"{SOCKET} is not there, or this account may not see it (group rkedge, or --sudo)"
