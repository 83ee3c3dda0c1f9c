"""The board's clocks at their maximum while answers are computed, if the settings ask for that.

Only root may write them. The keeper of `rkedge clocks` does it for as long as a connection to its socket is open
(docs/clocks.md): whatever ends this process closes that, and they are restored.
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

# Each clock at the highest value that the chip lists within its limits, where the kernel controls it.
_REQUEST: Final = json.dumps({"schema": SCHEMA}).encode() + b"\n"
_MOST_BYTES: Final = 1 << 16
_MOST_TEXT: Final = 500
# A keeper is started for the connection, and reads each value back.
_PATIENCE_S: Final = 30.0
# Before it is tried again after it has failed.
_AGAIN_S: Final = 10.0

log = logging.getLogger("rkedge")


class Clocks:
    """Holds them. Answers never wait for that, and do not fail if it does.

    Args:
        seconds: For how long after an answer; 0 leaves them alone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._holding: asyncio.Task[None] | None = None
        self._end: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._said = ""

    def change(self, seconds: float) -> None:
        """Hold them for so long from now on, also those that are held."""
        self._seconds = seconds
        if not seconds:
            self._let_go()
        elif self._end is not None:
            self._let_go_later()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold them while the block runs, and for the time after it."""
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
        """Have them restored."""
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
        """Hold them until this is cancelled, or the keeper ends."""
        try:
            reader, writer = await asyncio.open_unix_connection(SOCKET, limit=_MOST_BYTES)
        except OSError as error:
            self._failed(f"{SOCKET}: {error.strerror or error}")
            return
        try:
            writer.write(_REQUEST)
            event = _event(await asyncio.wait_for(reader.readline(), _PATIENCE_S))
            if event.get("event") != "set":
                self._failed(str(event.get("message") or "its keeper did not answer")[:_MOST_TEXT])
                return
            self._say("the clocks are held while answers are computed")
            while await reader.read(_MOST_BYTES):  # it says nothing more, and ends when systemd ends it
                pass
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            self._failed(f"its keeper did not answer ({type(error).__name__})")
        finally:
            writer.close()

    def _failed(self, why: str) -> None:
        self._not_before = time.monotonic() + _AGAIN_S
        self._say(f"the clocks cannot be held: {why}", logging.WARNING)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        """Log it, unless it is what was said last."""
        if text != self._said:
            self._said = text
            log.log(level, "%s", text)


def _event(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return {}
