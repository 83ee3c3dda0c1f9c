"""A connection parses and sends in pieces of its own, and its client sees none of that."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rkruntime.serve.connections import _SLICE, _TOGETHER, CONNECTION, Connection, _Counted


@pytest.mark.parametrize("close_after", [None, 3])
def test_slices(monkeypatch: pytest.MonkeyPatch, close_after: int | None) -> None:
    parsed: list[bytes] = []
    turns: list[int] = []
    transport = Mock(is_closing=lambda: len(parsed) == close_after)
    monkeypatch.setattr(H11Protocol, "data_received", lambda _, data: parsed.append(data))

    async def main() -> None:
        one: Any = Connection.__new__(Connection)
        one.loop, one.cycle, one._deadline = asyncio.get_running_loop(), None, object()
        one._counted = one.transport = _Counted(transport, one.loop)
        one.flow = FlowControl(one.transport)
        one.data_received(DATA)
        # What uvicorn wants while slices are left does not let more in.
        one.flow.pause_reading()
        one.flow.resume_reading()
        assert not transport.resume_reading.called
        while one._unread:
            turns.append(len(parsed))
            await asyncio.sleep(0)
        one.data_received(b"more")

    asyncio.run(main())
    if close_after:
        assert len(parsed) == close_after
    else:
        assert b"".join(parsed) == DATA + b"more"
        assert transport.resume_reading.call_count == 1
    assert max(map(len, parsed)) <= _SLICE
    assert turns == list(range(1, turns[-1] + 1))


async def _answered(protocol: type[H11Protocol], app: Any, folder: Path, version: str, *, half: bool) -> list[bytes]:
    """What a client reads from a server with this protocol: the head's lines, sorted, and what follows."""
    config, state = Config(app, http=protocol, lifespan="off", log_config=None), ServerState()
    config.load()
    path = str(folder / protocol.__module__)
    loop = asyncio.get_running_loop()
    async with await loop.create_unix_server(lambda: protocol(config, state, {}, loop), path):
        with socket.socket(socket.AF_UNIX) as one:
            one.setblocking(False)
            one.connect(path)
            close = "keep-alive" if half else "close"
            one.send(f"GET / HTTP/{version}\r\nHost: localhost\r\nConnection: {close}\r\n\r\n".encode())
            if half:
                one.shutdown(socket.SHUT_WR)
            seen = b""
            while part := await asyncio.wait_for(loop.sock_recv(one, 1 << 16), 20):
                seen += part
    head, _, rest = seen.partition(b"\r\n\r\n")
    return [*sorted(head.split(b"\r\n")), rest]


@pytest.mark.parametrize("half", [False, True], ids=["", "half-closed"])
@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "2.0"])
@pytest.mark.parametrize("parts", [[0], [15], [1, 2, 3], [20_000, 5], [200_000]], ids=str)
def test_a_client_reads_what_uvicorns_own_connection_sends(
    tmp_path: Path, parts: list[int], version: str, half: bool
) -> None:
    """Whether parts are sent or pushed, and even if the client shuts its sending half with the request."""

    async def app(scope: Any, _: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        connection = scope["state"].get(CONNECTION)
        for number, size in enumerate(parts):
            body = b"%d" % number * size
            if not (connection and number and connection.push(body)):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    ours = Connection.of(Mock(peer=lambda _: 0), 9, 20, 20)
    read = [asyncio.run(_answered(one, app, tmp_path, version, half=half)) for one in (H11Protocol, ours)]
    assert b"HTTP/1.1 200 OK" in read[0]
    assert read[0] == read[1]


@given(
    st.lists(
        st.one_of(
            st.sampled_from([0, 1, _TOGETHER, _TOGETHER + 1, 50_000]), st.sampled_from(["push", "turn", "close"])
        ),
        max_size=12,
    )
)
def test_what_is_written_in_one_turn_is_sent_together_and_in_order(steps: list[Any]) -> None:
    sent: list[bytes] = []
    given: list[bytes] = []
    closed: list[int] = []
    together: list[int] = []
    transport = Mock(
        write=sent.append, is_closing=lambda: bool(closed), close=lambda: closed.append(sum(map(len, sent)))
    )

    async def main() -> None:
        loop = asyncio.get_running_loop()
        one: Any = Connection.__new__(Connection)
        one.cycle = Mock(disconnected=False, response_complete=False, response_started=True)
        one.scope, one._counted = {"http_version": "1.0"}, _Counted(transport, loop)
        one.flow = Mock(write_paused=False)
        for number, step in enumerate(steps):
            if closed:
                break
            if step == "turn":
                before = len(sent)
                await asyncio.sleep(0)
                together.append(len(sent) - before)
            elif step == "close":
                one._counted.close()
            else:
                data = b"%d" % (number % 10) * (7 if step == "push" else step)
                given.append(data)
                if step == "push":
                    assert one.push(data)
                else:
                    one._counted.write(data)
            assert one._counted.written - sum(map(len, sent)) <= _TOGETHER
        await asyncio.sleep(0)

    asyncio.run(main())
    assert b"".join(sent) == b"".join(given)
    assert closed in ([], [len(b"".join(given))])
    assert max(together, default=0) <= 1


DATA = random.Random(5).randbytes(10 * _SLICE + 17)
