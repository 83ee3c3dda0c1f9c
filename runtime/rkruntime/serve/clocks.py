"""Hold the board's clocks at their maximum while answers are computed, if the settings ask for that.

Only root may set clocks. The keeper of `rkedge clocks` holds them for as long as a connection to its socket is open
(docs/clocks.md): however this process ends, the connection closes, and the keeper restores the clocks.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from rkruntime.checks.keeper import SCHEMA, SOCKET
from rkruntime.serve.cancel import time_limit

# The default request: each clock that the kernel controls, at the highest value that the chip lists within its limits.
_REQUEST: Final = json.dumps({"schema": SCHEMA}).encode() + b"\n"
_MOST_BYTES: Final = 1 << 16
_MOST_TEXT: Final = 500
# Seconds for an answer: a keeper is started for the connection, and reads each value back.
_PATIENCE_S: Final = 30.0
# Seconds before the next attempt after a failure.
_AGAIN_S: Final = 10.0

log = logging.getLogger("rkedge")


class Clocks:
    """Holds the board's clocks. Answers never wait for it, and do not fail if it fails.

    Args:
        seconds: How long to hold them after an answer; 0 leaves them alone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._holding: asyncio.Task[None] | None = None
        self._end: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._said = ""

    def change(self, seconds: float) -> None:
        """Set for how long the clocks are held from now on, including those held already."""
        self._seconds = seconds
        if not seconds:
            self._let_go()
        elif self._end is not None:
            self._let_go_later()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the clocks during the block and for the time set afterwards."""
        if self._seconds:
            self._hold()
        try:
            yield
        finally:
            if self._holding is not None:
                self._let_go_later()

    def _let_go_later(self) -> None:
        self._stay()
        self._end = asyncio.get_running_loop().call_later(self._seconds, self._let_go)

    def _stay(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _let_go(self) -> None:
        """Have the keeper restore the clocks."""
        self._stay()
        if self._holding is not None:
            self._holding.cancel()
            self._holding = None

    def _hold(self) -> None:
        self._stay()
        ended = self._holding is None or self._holding.done()
        if ended and time.monotonic() >= self._not_before:
            self._holding = asyncio.get_running_loop().create_task(self._connection())

    async def _connection(self) -> None:
        """Hold the clocks until this task is cancelled or the keeper ends."""
        try:
            reader, writer = await asyncio.open_unix_connection(SOCKET, limit=_MOST_BYTES)
        except OSError as error:
            self._failed(f"{SOCKET}: {error.strerror or error}")
            return
        try:
            writer.write(_REQUEST)
            with time_limit(_PATIENCE_S, TimeoutError):
                event = _event(await reader.readline())
            if event.get("event") != "set":
                self._failed(str(event.get("message") or "its keeper did not answer")[:_MOST_TEXT])
                return
            self._say("the clocks are held while answers are computed")
            while await reader.read(_MOST_BYTES):  # the keeper says nothing more, and ends when systemd ends it
                pass
        except (OSError, ValueError) as error:
            self._failed(f"its keeper did not answer ({type(error).__name__})")
        finally:
            writer.close()

    def _failed(self, why: str) -> None:
        self._not_before = time.monotonic() + _AGAIN_S
        self._say(f"the clocks cannot be held: {why}", logging.WARNING)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        """Log a text unless it is the same as the last one."""
        if text != self._said:
            self._said = text
            log.log(level, "%s", text)


def _event(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return {}
