"""Figures for Prometheus, and the board's state, as far as it can be read without root."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rkruntime.checks.machine import npu_load

if TYPE_CHECKING:
    from rkruntime.serve.host import Host
    from rkruntime.serve.queue import FairQueue
    from rkruntime.text.answer import Answer

_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_THERMAL: Final = "sys/class/thermal"


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Return degrees Celsius by thermal zone, such as `npu-thermal`; empty if there are none."""
    found = {}
    for zone in sorted((root / _THERMAL).glob("thermal_zone*")):
        # A zone that is switched off cannot be read; the others can.
        with suppress(OSError, ValueError):
            found[(zone / "type").read_text().strip()] = int((zone / "temp").read_text()) / 1000
    return found


class Metrics:
    """Counters of answers, and gauges that read the state of the service and the board when scraped.

    Args:
        begun: Returns the number of tokens so far of the answer being computed; `answered` adds them when it ends.
    """

    def __init__(self, queue: FairQueue, host: Host, begun: Callable[[], int], root: Path = Path("/")) -> None:
        self._registry = CollectorRegistry()
        self._root = root
        self._reading = threading.Lock()
        self._requests = Counter(
            "rkedge_requests", "Requests for an answer, by outcome.", ["outcome"], registry=self._registry
        )
        self._duration = self._seconds("request_seconds", "Time from a request to the end of its answer.")
        self._queued = self._seconds("queue_seconds", "Time spent waiting for the NPU.")
        self._first = self._seconds("first_token_seconds", "Time from the request's turn to its first token.")
        self._prompt = self._count("prompt_tokens", "Prompt tokens.")
        self._reused = self._count("prefill_saved_tokens", "Prompt tokens that were already in the KV cache.")
        self._generated = self._count("generated_tokens", "Generated tokens.")
        self._look("queue_length", "Requests waiting for the NPU.", lambda: len(queue))
        self._look("answer_tokens", "Tokens generated so far for the answer that is being computed.", begun)
        self._look("busy", "1 while an answer is being computed.", lambda: queue.busy)
        self._look("model_loaded", "1 while a model is loaded.", lambda: host.current is not None)
        self._look("worker_restarts", "Workers lost.", lambda: host.restarts)
        self._zones = Gauge("rkedge_temperature_celsius", "By thermal zone.", ["zone"], registry=self._registry)
        self._cores = Gauge("rkedge_npu_load", "Fraction of time a core was busy.", ["core"], registry=self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"rkedge_{name}", text, buckets=_SECONDS, registry=self._registry)

    def _count(self, name: str, text: str) -> Counter:
        return Counter(f"rkedge_{name}", text, registry=self._registry)

    def _look(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"rkedge_{name}", text, registry=self._registry).set_function(read)

    def answered(self, answer: Answer, reused: int, queue_s: float, prefill_s: float) -> None:
        """Count a complete answer, and how many of its prompt tokens were `reused` from the KV cache."""
        self._queued.observe(queue_s)
        self._first.observe(prefill_s)
        self._prompt.inc(answer.prompt_tokens)
        self._reused.inc(reused)
        self._generated.inc(len(answer.tokens) - answer.begun)

    def ended(self, outcome: str, seconds: float) -> None:
        """Count a finished request: `ok`, `cancelled`, or the class of its error."""
        self._requests.labels(outcome).inc()
        self._duration.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format. Reads files; thread-safe."""
        with self._reading:
            for gauge, values in self._board():
                gauge.clear()
                for name, value in values.items():
                    gauge.labels(name).set(value)
            return generate_latest(self._registry)

    def _board(self) -> Iterator[tuple[Gauge, Mapping[str, float]]]:
        yield self._zones, temperatures(self._root)
        yield self._cores, npu_load(self._root)
