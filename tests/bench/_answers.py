"""A client's view of a streamed answer: its events, when each token had arrived, and whether the text is right."""

from __future__ import annotations

import http.client
import json
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from urllib.parse import urlsplit

from tests.bench._servers import Server

_PATIENCE_S = 120


@dataclass(frozen=True)
class Answer:
    """An answer as it arrived. Times are seconds after the question.

    Attributes:
        events: Arrival and text of each event that has a text.
        failure: What the server said instead of an answer.
    """

    events: Sequence[tuple[float, str]]
    failure: str = ""

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.events)

    @property
    def first_s(self) -> float:
        """Seconds to the first text."""
        return self.events[0][0]

    @property
    def spoken_s(self) -> float:
        """Seconds from the first text to the last."""
        return self.events[-1][0] - self.first_s

    def gaps(self, tokens: Sequence[str]) -> list[float]:
        """Seconds between the arrivals of one token's last letter and the next one's; of a right answer only."""
        said = list(accumulate(len(text) for _, text in self.events))
        arrived = [self.events[bisect_left(said, end)][0] for end in accumulate(map(len, tokens))]
        return [later - earlier for earlier, later in pairwise(arrived)]


def ask(server: Server) -> Answer:
    """Ask for a streamed answer. A failure is one, not an exception: under load, peers do fail."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_PATIENCE_S)
    body = {"model": server.model, "messages": [{"role": "user", "content": "Go."}], "stream": True}
    pieces: list[tuple[float, bytes]] = []
    try:
        connection.connect()
        began = time.perf_counter()
        connection.request("POST", parts.path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        while piece := response.read1(1 << 18):
            pieces.append((time.perf_counter() - began, piece))
    except (OSError, http.client.HTTPException) as error:
        return Answer(_events(pieces), f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    said = b"".join(piece for _, piece in pieces)
    if response.status != 200:
        return Answer(_events(pieces), f"{response.status}: {said[:200]!r}")
    # Whatever came, an answer without its end is broken off.
    return Answer(_events(pieces), "" if said.rstrip().endswith(b"data: [DONE]") else f"the end is {said[-200:]!r}")


def ask_together(server: Server, count: int) -> list[Answer]:
    """The answers to questions of several clients that begin at once."""
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(server))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _events(pieces: Sequence[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """The texts in a stream of events, each with the arrival of the piece that ended its line."""
    ends = list(accumulate(len(piece) for _, piece in pieces))
    found, at = [], 0
    for line in b"".join(piece for _, piece in pieces).split(b"\n"):
        at += len(line) + 1
        if text := _text(line):
            found.append((pieces[min(bisect_left(ends, at), len(pieces) - 1)][0], text))
    return found


def _text(line: bytes) -> str:
    try:
        choices = json.loads(line.removeprefix(b"data: "))["choices"]
        return "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
