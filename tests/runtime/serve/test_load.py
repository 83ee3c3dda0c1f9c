"""Many clients at once, some of which go away, and a worker that is killed again and again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import questions

QA = {row.question: row.answer for row in questions()}
CLIENTS = 64


async def ask(path: Path, question: str, leave_after: int | None) -> str:
    """One streamed answer over a connection of its own: `exact`, `error`, `refused` or `left`; AssertionError else."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        body = json.dumps({"messages": [{"role": "user", "content": question}], "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Connection: close\r\n\r\n"
        writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        data = b""
        while part := await reader.read(4096):
            data += part
            if leave_after is not None and len(data) > leave_after:
                return "left"
        if status != 200:
            assert status in (429, 502, 503), data
            return "refused"
        return judge(data, question)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def judge(data: bytes, question: str) -> str:
    lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    if "error" in events[-1]:
        return "error"
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert lines[-1] == "[DONE]", lines[-3:]
    assert text == QA[question]
    return "exact"


async def client(daemon: Any, number: int, end: float, counts: Counter[str]) -> None:
    chance = random.Random(number)
    loop = asyncio.get_running_loop()
    while loop.time() < end:
        leave = chance.randrange(200, 2500) if chance.random() < 0.25 else None
        outcome = await asyncio.wait_for(ask(daemon.socket, chance.choice(list(QA)), leave), 60)
        counts[outcome] += 1
        if outcome == "refused":
            await asyncio.sleep(0.05)


async def killer(daemon: Any, end: float, every: float, counts: Counter[str]) -> None:
    while asyncio.get_running_loop().time() < end:
        await asyncio.sleep(every)
        for worker in daemon.workers():
            with suppress(ProcessLookupError, FileNotFoundError):
                keeper = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
                os.kill(worker, signal.SIGKILL)
                counts["kills"] += 1
                # It outlives its worker. Whoever asks in the instant between gets an error, and so would `settle`.
                while Path(f"/proc/{keeper}/cmdline").read_bytes():
                    await asyncio.sleep(0.002)


def settle(daemon: Any) -> None:
    """Wait until nothing is asked or loaded. The last kill of a storm may come after its last question."""
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["queue"] == {"waiting": 0, "busy": False})
    for question, answer in QA.items():
        assert daemon.ask(question) == answer


def descriptors(daemon: Any) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def memory_mb(daemon: Any) -> float:
    return int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def storm(daemon: Any, seconds: float, kill_every: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    end = asyncio.get_running_loop().time() + seconds
    tasks = [client(daemon, number, end, counts) for number in range(CLIENTS)]
    await asyncio.gather(*tasks, killer(daemon, end, kill_every, counts))
    return counts


def run_storm(daemon: Any, seconds: float, kill_every: float) -> None:
    for question, answer in QA.items():
        assert daemon.ask(question) == answer
    # Buffers, known answers and the heap's gaps grow for half a minute, from 42 to about 51 MB, and no further.
    asyncio.run(storm(daemon, seconds / 3, kill_every))
    settle(daemon)
    fds, memory = descriptors(daemon), memory_mb(daemon)
    counts = asyncio.run(storm(daemon, seconds, kill_every))
    print(dict(counts))
    assert counts["exact"] > 10
    assert counts["left"] > 0
    assert counts["kills"] > 0
    assert daemon.process.poll() is None
    settle(daemon)
    daemon.wait_until(lambda: descriptors(daemon) <= fds + 2)
    assert memory_mb(daemon) < memory + 8
    assert len(daemon.workers()) == 1


@pytest.fixture
def storm_daemon(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("limits: {queue: 256, wait_s: 30}", port=False, RKEMU_TOKEN_US="200")


def test_clients_that_leave_and_workers_that_die(storm_daemon: Any) -> None:
    run_storm(storm_daemon, seconds=4, kill_every=0.9)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_minute_of_it(storm_daemon: Any) -> None:
    run_storm(storm_daemon, seconds=60, kill_every=3)
