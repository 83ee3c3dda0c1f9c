"""The daemon's own part from a token to the client, beside other servers with the same library that computes nothing.

The servers are asked in turns, at several paces of the library. An event is one with a text; a token has arrived when
its last letter has. CPU time is that of a server's processes together, with the threads that have ended, and has the
library's own in it, the same for all: it wakes up for each token. Every answer is compared with what the library said.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench._answers import Answer, ask, ask_together
from tests.bench._report import Aim, Report, at_least, at_most, pairs, turns
from tests.bench._servers import (
    FLASK,
    OURS,
    RKLLAMA,
    Server,
    empty_pythons,
    our_daemon,
    peers,
    prepare,
    script,
    versions,
)

PEERS = """
    git clone https://github.com/airockchip/rknn-llm
    git clone https://github.com/NotPunchnox/rkllama
    RKEDGE_BENCH_VENDOR=rknn-llm RKEDGE_BENCH_RKLLAMA=rkllama python -m tests.bench serve_speed

Both run unmodified, as their own main programs start them, with what tests/conformance/requirements.txt pins: the
vendor's flask_server.py of 1.3.0 in Flask's own server with one thread, which says each letter in an event of its own,
and rkllama in Flask's server with a thread for each request and a process for the model.
"""
LIMITS = """
On a PC, with a library that computes nothing: a board's cores are slower, and its NPU's driver takes time of its own.
A client on the same machine takes its part of the CPUs, at a pace of 0 us most of one.
"""
FIRST_ASKS, CLIENTS = 3, 8
EMPTY = "as many Pythons that do nothing"
# Delays are those of a server only where a sleep ends in time.
LATE_MS, LOOKS = 0.5, 300


@dataclass(frozen=True)
class Pace:
    """How many tokens the library says, the microseconds between two, and what is wanted of us at that pace."""

    name: str
    tokens: int
    microseconds: int
    cpu: Mapping[str, Aim]
    events: Mapping[str, Aim]
    clients: int = 1


PACES = (
    Pace("20 ms", 150, 20_000, {FLASK: at_most(1)}, {}),
    Pace("2 ms", 400, 2_000, {FLASK: at_most(1)}, {}),
    Pace("200 us", 2_000, 200, {}, {}),
    Pace("0 us", 4_000, 0, {}, {RKLLAMA: at_least(3)}),
    Pace(f"2 ms, {CLIENTS} clients", 50, 2_000, {}, {}, CLIENTS),
)
FIRST = Pace("the first token", 10, 2_000, {}, {})


@dataclass(frozen=True)
class Turn:
    """What one server did in one turn."""

    answers: Sequence[Answer]
    tokens: Sequence[str]
    cpu_s: float
    seconds: float

    @property
    def wrong(self) -> int:
        """Answers that are not what the library said."""
        expected = "".join(self.tokens)
        return sum(bool(answer.failure) or answer.text != expected for answer in self.answers)

    @property
    def _count(self) -> int:
        return len(self.tokens) * len(self.answers)

    @property
    def cpu_us(self) -> float:
        return self.cpu_s / self._count * 1e6

    @property
    def tokens_s(self) -> float:
        return self._count / self.seconds

    @property
    def events_s(self) -> float:
        return sum(len(answer.events) for answer in self.answers) / self.seconds

    @property
    def events_a_token(self) -> float:
        return sum(len(answer.events) for answer in self.answers) / self._count


def turn(server: Server, folder: Path, pace: Pace) -> Turn:
    """Let one server answer once, or its clients at once."""
    tokens = script(folder, pace.tokens, pace.microseconds)
    before, began = server.cpu_s(), time.perf_counter()
    answers = [ask(server)] if pace.clients == 1 else ask_together(server, pace.clients)
    seconds = time.perf_counter() - began
    time.sleep(0.05)  # what a server does after its answer is its cost, too
    spoken = answers[0].spoken_s if pace.clients == 1 and len(answers[0].events) > 1 else seconds
    return Turn(answers, tokens, server.cpu_s() - before, spoken)


def _run(servers: Mapping[str, Server], folder: Path, pace: Pace, rounds: int) -> dict[str, list[Turn]]:
    def of(server: Server) -> list[Turn]:
        return [turn(server, folder, pace) for _ in range(FIRST_ASKS if pace is FIRST else 1)]

    found = turns({name: lambda server=server: of(server) for name, server in servers.items()}, rounds)  # type: ignore[misc]
    return {name: [one for several in found[name] for one in several] for name in servers}


def _of_right(pace: Pace, found: Mapping[str, list[Turn]]) -> dict[str, list[Turn]]:
    """The servers whose answers were right: a figure of others means nothing. Ours stays, and fails the benchmark."""
    for name, several in found.items():
        if wrong := sum(one.wrong for one in several):
            failure = next((answer.failure for one in several for answer in one.answers if answer.failure), "")
            print(f"{pace.name}: {name} gave {wrong} wrong answers, so it has no figures there. {failure}", flush=True)
    return {name: several for name, several in found.items() if name == OURS or not any(one.wrong for one in several)}


def _paced(report: Report, pace: Pace, found: Mapping[str, list[Turn]], late_ms: float) -> None:
    wrong = sum(one.wrong for one in found[OURS])
    report.figure(f"{pace.name}: answers not as the library said them", OURS, wrong, "", at_most(0))
    right = _of_right(pace, found)
    if wrong:
        return
    cpu = {name: [one.cpu_us for one in several] for name, several in right.items()}
    report.compare(f"{pace.name}: CPU time a token", "us", cpu, aims=pace.cpu)
    for name, several in right.items():
        one_each = at_least(0.999) if name == OURS else None
        report.figure(f"{pace.name}: events a token", name, [one.events_a_token for one in several], "", one_each)
    if pace.clients > 1:
        rates = {name: [one.tokens_s for one in several] for name, several in right.items()}
        report.compare(f"{pace.name}: tokens of all", "/s", rates)
        last = {name: [max(one.first_s for one in each.answers) * 1e3 for each in right[name]] for name in right}
        report.compare(f"{pace.name}: until the last client's first token", "ms", last)
    elif pace.microseconds and late_ms > LATE_MS:
        report.unmeasured(f"{pace.name}: between tokens", OURS, "ms", None, _busy(late_ms))
    elif pace.microseconds:
        for name, several in right.items():
            gaps = [gap * 1e3 for one in several for gap in one.answers[0].gaps(one.tokens)]
            report.figure(f"{pace.name}: between tokens", name, statistics.median(gaps), "ms")
            report.figure(f"{pace.name}: between tokens, 99 %", name, statistics.quantiles(gaps, n=100)[98], "ms")
    else:
        rates = {name: [one.events_s for one in several] for name, several in right.items()}
        report.compare(f"{pace.name}: events", "/s", rates, aims=pace.events)
        for name, several in right.items():
            report.figure(f"{pace.name}: tokens", name, [one.tokens_s for one in several], "/s")


def _first(report: Report, found: Mapping[str, list[Turn]], late_ms: float) -> None:
    what, aim = "first token, without the library's time", at_most(3)
    if late_ms > LATE_MS:
        report.unmeasured(what, OURS, "ms", aim, _busy(late_ms))
        return
    pause = FIRST.microseconds / 1e3
    took = {
        name: [one.answers[0].first_s * 1e3 - pause for one in several]
        for name, several in _of_right(FIRST, found).items()
    }
    report.compare(what, "ms", took, aim=aim)


def _busy(late_ms: float) -> str:
    return f"the machine is busy: one of ten sleeps ended {late_ms:.1f} ms late"


def _lateness_ms() -> float:
    """How late this process wakes up from one of ten sleeps, or later: what a delay measured here has of others."""
    late = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        time.sleep(0.002)
        late.append((time.perf_counter() - began) * 1e3 - 2)
    return statistics.quantiles(late, n=10)[8]


def main() -> int:
    """Measure our daemon and the peers that are set up."""
    report = Report("serve_speed", __doc__ or "", peers=PEERS, limits=LIMITS, versions=versions())
    report.version_of("uvicorn", "h11", "starlette")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        with our_daemon(folder) as ours, peers(folder) as others:
            servers = {OURS: ours, **others}
            for missing in {FLASK, RKLLAMA} - others.keys():
                print(f"{missing} is not set up:\n{PEERS}", flush=True)
            _run(servers, folder, FIRST, 2)  # a model that is loaded with the first question, caches
            before = _lateness_ms()
            found = _run(servers, folder, FIRST, pairs())
            _first(report, found, max(before, _lateness_ms()))
            for kind, aim in (("Rss", at_most(60)), ("Pss", None)):
                for name, server in servers.items():
                    of_ours = aim if name == OURS else None
                    report.figure(f"memory, {kind} of all processes", name, server.memory_mb(kind), "MB", of_ours)
                report.figure(f"memory, {kind} of all processes", EMPTY, empty_pythons(len(ours.tree()), kind), "MB")
            only = [name for name in os.environ.get("RKEDGE_BENCH_PACES", "").split(",") if name]
            for pace in PACES:
                if not only or pace.name in only:
                    found = _run(servers, folder, pace, pairs())
                    _paced(report, pace, found, _lateness_ms())
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
