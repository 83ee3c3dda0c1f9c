"""The connections of a listener: which of them give way when there are too many, and how long they may take."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rkruntime.errors import BusyError
from rkruntime.serve.doors import Door
from rkruntime.serve.users import User, shares

# The key of a connection in an ASGI scope's state.
CONNECTION: Final = "rkedge.connection"
_FULL: Final = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
# Bytes to parse before other connections get a turn: a body in chunks of one byte costs thousands of events.
_SLICE: Final = 8192
# Bytes that the chunks of a body must have on average, and the number of smaller chunks that is tolerated.
_PIECE: Final = 64
_SMALL_PIECES: Final = 256
# Most bytes that wait for what else is written.
_TOGETHER: Final = 4096


class Requests:
    """The requests being answered, by user: each user has a share of them, whatever the listener.

    Args:
        limit: Most requests of all users together.
        max_bytes: Most memory that all requests together may hold.
    """

    def __init__(self, limit: int, max_bytes: int) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._open: Counter[tuple[str, ...]] = Counter()
        self._bytes: Counter[tuple[str, ...]] = Counter()

    @contextmanager
    def one(self, user: User) -> Iterator[Held]:
        """Count one more request during the block; the value counts the memory it holds. Raises BusyError."""
        paths = dict(shares(user.path, self._limit))
        for path, limit in paths.items():
            if self._open[path] >= limit:
                raise BusyError(
                    f"{limit} of your requests are being answered, which is the limit for one user.",
                    details={"retry_after_s": 1},
                )
        self._open.update(paths.keys())
        held = Held(self._bytes, {(): self._max_bytes, **dict(shares(user.path, self._max_bytes))})
        try:
            yield held
        finally:
            held.release()
            self._open.subtract(paths.keys())
            self._open += Counter()


class Held:
    """Bytes that one request holds in memory: its body, and an answer built before it is sent.

    Args:
        used: Bytes held by all requests together, including this one.
        limits: Limit of each entry in `used` that this request counts towards.
    """

    def __init__(self, used: Counter[tuple[str, ...]], limits: Mapping[tuple[str, ...], int]) -> None:
        self._used, self._limits = used, limits
        self._size = 0

    def at_least(self, size: int) -> None:
        """Hold at least `size` bytes. A request that is the only one always may.

        Raises:
            BusyError: That is too much on top of what other requests hold.
        """
        more = size - self._size
        if more <= 0:
            return
        for path, limit in self._limits.items():
            others = self._used[path] - self._size
            if others and others + size > limit:
                whose = "your" if path else "all"
                raise BusyError(
                    f"This request's {size:,} bytes are too many on top of those of {whose} other requests.",
                    hint="Send large requests one after the other.",
                    details={"retry_after_s": 1},
                )
        self._add(more)

    def release(self) -> None:
        """Stop holding any bytes."""
        self._add(-self._size)

    def _add(self, size: int) -> None:
        self._size += size
        for path in self._limits:
            self._used[path] += size
            if not self._used[path]:
                del self._used[path]


class _Counted:
    """A transport (`plain`) that counts the bytes written to it, and does not resume reading while held.

    What is written in one turn of the event loop, such as a head and a body, is sent together: each send is a system
    call that wakes the client up.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.plain = transport
        self.written = 0
        self.held = False
        self._loop = loop
        self._unsent = b""

    def resume_reading(self) -> None:
        if not self.held:
            self.plain.resume_reading()

    def write(self, data: bytes) -> None:
        self.written += len(data)
        if not self._unsent:
            self._loop.call_soon(self.flush)
        self._unsent += data
        if len(self._unsent) > _TOGETHER:
            self.flush()

    def flush(self) -> None:
        if self._unsent:
            data, self._unsent = self._unsent, b""
            self.plain.write(data)

    def close(self) -> None:
        self.flush()
        self.plain.close()

    def abort(self) -> None:
        self.flush()
        self.plain.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


class _Parser(h11.Connection):
    """h11's parser, which also refuses bodies that cost too much to parse, or that a proxy may read differently."""

    _pieces = 0.0

    def next_event(self) -> Any:
        """See h11. Each chunk costs the same, whatever its size."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            _check_framing(event)
            self._pieces = 0.0
        elif isinstance(event, h11.Data):
            self._pieces += 1 - len(event.data) / _PIECE
            if self._pieces > _SMALL_PIECES:
                raise h11.RemoteProtocolError("the body comes in too many small chunks")
        return event


def _check_framing(request: h11.Request) -> None:
    """Raise RemoteProtocolError if a proxy may see another end of the body, and so another request behind it.

    By RFC 9112 (6.1, 6.3), chunks overrule a length, and mean nothing in HTTP/1.0; not all proxies know that.
    """
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
        raise h11.RemoteProtocolError("the body's length is given in two ways")


class Connection(H11Protocol):
    """uvicorn's connection with limits. It keeps its place while a known user's request is being answered.

    Otherwise, when there are too many connections, the oldest one of the peer that has the most gives way. So clients
    that only connect do not take places from those that send requests.

    Attributes:
        door: The listener that accepted it. This and the limits are class attributes, one class per listener (`of`).
        limit: Most connections at the same time.
        header_s: Seconds to wait for a request's whole head before the connection is closed.
        write_s: Seconds for which a client may read nothing of an answer before the connection is aborted.
    """

    door: ClassVar[Door]
    limit: ClassVar[int]
    header_s: ClassVar[float]
    write_s: ClassVar[float]

    peer: Hashable = None
    answering = 0
    _idle_since = 0.0
    _taken = 0
    _moved = 0.0
    _broken = False
    _unread = b""
    _deadline: Any = None

    @classmethod
    def of(cls, door: Door, limit: int, header_s: float, write_s: float) -> type[Connection]:
        """Make the class for a listener's connections."""
        values = {"door": door, "limit": limit, "header_s": header_s, "write_s": write_s}
        return cast("type[Connection]", type("Connection", (cls,), values))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser(h11.SERVER, self.conn._max_incomplete_event_size)

    def send_400_response(self, msg: str) -> None:
        """See uvicorn. The code that produces an answer is also told that the client is gone, and stops sending."""
        self._forget_client()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self._counted = _Counted(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self._counted))
        self.peer = self.door.peer(transport.get_extra_info("socket"))
        self.app_state = {**self.app_state, CONNECTION: self}
        self._idle_since = self._moved = time.monotonic()
        self._expect()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        waiting = bool(self._unread)
        self._unread += data
        if not waiting:
            self._parse()

    def _parse(self) -> None:
        """Parse a slice of what has arrived, and read no more until other connections had their turn."""
        if not self._unread or self.transport.is_closing():
            self._unread = b""
            return
        part, self._unread = self._unread[:_SLICE], self._unread[_SLICE:]
        self._parse_slice(part)
        if self._unread:
            self._counted.held = True
            self.transport.pause_reading()
            self.loop.call_soon(self._parse)
        elif self._counted.held:
            self._counted.held = False
            # Unless uvicorn waits for the application to take the body.
            if not self.flow.read_paused:
                self.transport.resume_reading()

    def _parse_slice(self, part: bytes) -> None:
        super().data_received(part)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_expecting()
        elif self._deadline is None:
            self._expect()

    def eof_received(self) -> None:
        """See asyncio, which closes the connection now, though its client may still read."""
        self._counted.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._stop_expecting()
        self._unread = b""
        super().connection_lost(exc)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the connection's place during the block."""
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1
            self._idle_since = time.monotonic()

    @property
    def behind(self) -> bool:
        """Whether the client has not yet read what was sent before."""
        return self.flow.write_paused

    def push(self, body: bytes) -> bool:
        """Send a part of the current response, unless the client has not yet read what was sent before.

        Does what ASGI's `send` does, but at once rather than as a coroutine, as an answer has many parts.
        """
        cycle = self.cycle
        if cycle is None or cycle.disconnected or cycle.response_complete or not cycle.response_started:
            return False
        counted = self._counted
        if self.flow.write_paused or counted.plain.is_closing():
            return False
        # Framed as h11 does: as a chunk, unless the client's HTTP/1.0 does not have chunks.
        data = b"%x\r\n%b\r\n" % (len(body), body) if self.scope["http_version"] >= "1.1" else body
        counted.flush()
        counted.written += len(data)
        counted.plain.write(data)
        return True

    def give_up(self) -> None:
        """Abandon the request being answered, because the daemon is stopping and waits no longer."""
        self._break_off()

    def _forget_client(self) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def check_writing(self) -> None:
        """Abort the connection if its client has read nothing for too long; call it about every second."""
        now, unsent = time.monotonic(), self.transport.get_write_buffer_size()
        taken = self._counted.written - unsent
        if not unsent or taken > self._taken:
            self._moved = now
        self._taken = taken
        if now - self._moved > self.write_s:
            self._break_off()

    def _break_off(self) -> None:
        self._broken = True
        self._forget_client()
        self.transport.abort()

    def _make_room(self) -> None:
        others = cast("set[Connection]", self.connections)
        # A connection being closed may still wait for its client to read the rest of an answer.
        living = [one for one in others if not one._broken]
        if len(living) <= self.limit:
            return
        idle = [one for one in living if not one.answering]
        crowds = Counter(one.peer for one in idle)
        oldest = min(idle, key=lambda one: (-crowds[one.peer], one._idle_since))
        if oldest is self:
            self.transport.write(_FULL)
            self.transport.close()
        else:
            oldest._break_off()

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(self.header_s, self.transport.close)

    def _stop_expecting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
