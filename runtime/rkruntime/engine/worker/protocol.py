"""The protocol between parent and worker, over two pipes.

Parent to worker, a command: two u32 (size of the header, size of the data), a JSON header, data (arrays).
Worker to parent, a record: see RECORD, then its data. A token's record is smaller than PIPE_BUF, so that one write is
one record, even between threads.

Why pipes: measured on 2 cores (x86-64 guest, Linux 6.18), one 20-byte record from one process to another, with the
reader asleep: pipe 38 us median, socketpair (stream or seqpacket) 40, eventfd with a ring in shared memory 40. All of
it is the wake-up of the other process, so the reader polls for SPIN seconds before it sleeps. From the library's
callback to the event in the parent (`python -m tests.bench worker_events` under `chrt -f 5`, both cores busy with other
work): 170 us median with a token every 20 ms. Not measured on a board.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

RECORD: Final = struct.Struct("<BBHiI")
"""Kind, batch, number of the command that it belongs to (`run`, mod 2^16), value, size of the data."""
COMMAND: Final = struct.Struct("<II")

TOKEN, LOGITS, HIDDEN, FINISHED, REPLY, ERROR, TOKENIZE, EMBED = range(8)
"""Kinds of records. TOKEN: value = id, data = text. LOGITS, HIDDEN: value = columns, data = float32 rows. FINISHED,
REPLY, ERROR: data = JSON. TOKENIZE: data = a text; EMBED: data = int32 ids; the parent answers with a command."""

MAX_DATA: Final = 1 << 31
SPIN: Final = 50e-6
"""Seconds. A token takes tens of milliseconds on a board, so this costs less than 0.1 % of a core."""


class Record(NamedTuple):
    """A record as the parent reads it."""

    kind: int
    batch: int
    run: int
    value: int
    data: bytes


def write_all(fd: int, *parts: bytes | memoryview) -> None:
    """Write buffers completely to a blocking descriptor."""
    for part in parts:
        view = memoryview(part).cast("B") if len(part) else memoryview(b"")
        while view:
            view = view[os.write(fd, view) :]


def read_exactly(fd: int, size: int) -> bytes:
    """Read `size` bytes from a blocking descriptor. Raises EOFError if it ends early."""
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def pack_command(header: dict[str, Any], data: Sequence[bytes | memoryview] = ()) -> list[bytes | memoryview]:
    """Return the buffers of a command: the header, to which the sizes of the `data` parts are added, then the parts."""
    sizes = [memoryview(part).nbytes for part in data]
    text = json.dumps({**header, "sizes": sizes}).encode()
    return [COMMAND.pack(len(text), sum(sizes)) + text, *data]


def read_command(fd: int) -> tuple[dict[str, Any], list[memoryview]]:
    """Read the next command and its data parts. Raises EOFError when the parent is gone."""
    header_size, data_size = COMMAND.unpack(read_exactly(fd, COMMAND.size))
    header: dict[str, Any] = json.loads(read_exactly(fd, header_size))
    data = memoryview(read_exactly(fd, data_size))
    parts, at = [], 0
    for size in header["sizes"]:
        parts.append(data[at : at + size])
        at += size
    return header, parts
