"""The reader of a worker's records alone, with a pipe in the worker's place."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rkruntime.engine.worker.exchange import Exchange
from rkruntime.engine.worker.process import WorkerProcess
from rkruntime.errors import WorkerProtocolError

TOKEN = 0


@given(pieces=st.lists(st.binary(max_size=5000), max_size=20))
@settings(suppress_health_check=list(HealthCheck))
def test_random_bytes_from_a_pipe(pieces: list[bytes]) -> None:
    """The reader alone, however its bytes are cut: records that were meant, or WorkerProtocolError, and no memory."""
    with reading() as (worker, write):
        for piece in pieces:
            os.write(write, piece)
            try:
                while worker.receive():
                    while (found := worker.buffered()) is not None:
                        assert (found.run, found.batch) == (3, 0)
            except WorkerProtocolError:
                break


@given(
    texts=st.lists(st.one_of(st.binary(max_size=9), st.just(bytes(5000))), max_size=30),
    cuts=st.lists(st.integers(0, 100), max_size=60),
    looks=st.lists(st.booleans(), min_size=1, max_size=7),
)
@example(texts=[bytes(5000)] * 30, cuts=[], looks=[False])
@settings(suppress_health_check=list(HealthCheck))
def test_records_however_they_are_cut(texts: list[bytes], cuts: list[int], looks: list[bool]) -> None:
    """What was written comes out, whether the reader looks for records after each read or after several."""
    sent = b"".join(struct.pack("<BBHiI", TOKEN, 0, 3, at, len(text)) + text for at, text in enumerate(texts))
    ends = sorted({min(len(sent), 113 * cut) for cut in cuts} | {len(sent)})
    found: list[tuple[int, bytes]] = []

    def look(worker: WorkerProcess) -> None:
        while (record := worker.buffered()) is not None:
            assert (record.kind, record.batch, record.run) == (TOKEN, 0, 3)
            found.append((record.value, record.data))

    with reading() as (worker, write):
        for turn, (start, end) in enumerate(pairwise([0, *ends])):
            rest = sent[start:end]
            while rest:
                rest = rest[os.write(write, rest) :]
                while worker.receive():
                    if looks[turn % len(looks)]:
                        look(worker)
        look(worker)
    assert found == list(enumerate(texts))


@contextmanager
def reading() -> Iterator[tuple[WorkerProcess, int]]:
    """The reader of a worker that says nothing, and a pipe to write to in its place, as much at once as it holds."""
    worker = WorkerProcess((sys.executable, "-c", "input()"), os.environ)
    read, write = os.pipe()
    try:
        worker.expect(Exchange(3, "generate"))
        os.dup2(read, worker.records_fd)
        for end in (worker.records_fd, write):
            os.set_blocking(end, False)
        yield worker, write
    finally:
        os.close(read)
        os.close(write)
        worker.end(0)
        worker.close_pipes()
