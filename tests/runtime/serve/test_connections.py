"""A connection parses what it gets in slices, so that others have their turn in between."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from unittest.mock import Mock

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from rkruntime.serve.connections import _SLICE, Connection, _Counted


@pytest.mark.parametrize("close_after", [None, 3])
def test_slices(monkeypatch: pytest.MonkeyPatch, close_after: int | None) -> None:
    parsed: list[bytes] = []
    turns: list[int] = []
    transport = Mock(is_closing=lambda: len(parsed) == close_after)
    monkeypatch.setattr(H11Protocol, "data_received", lambda _, data: parsed.append(data))

    async def main() -> None:
        one: Any = Connection.__new__(Connection)
        one.loop, one.cycle, one._deadline = asyncio.get_running_loop(), None, object()
        one._counted = one.transport = _Counted(transport)
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


DATA = random.Random(5).randbytes(10 * _SLICE + 17)
