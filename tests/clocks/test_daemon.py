"""A daemon that has the clocks held while it answers: by real keepers, as the socket unit starts them."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.serve.conftest import bundles, start_daemon  # noqa: F401

from rkconvert.demo import questions
from rkruntime.program import own_command
from rkruntime.serve import clocks

from .chip import BEST, Chip, running, wait_until
from .test_clocks import as_before

FIRST = "What is the RK3588?"
QA = {row.question: row.answer for row in questions()}
SLOW = {"RKEMU_TOKEN_US": "400000"}
PROGRAM = "tests.clocks.serving"


class Unit:
    """The socket unit: what becomes of each connection, in the order in which they come."""

    def __init__(self, path: Path, answer: Callable[[socket.socket], object]) -> None:
        self.path, self.connections = path, 0
        self._answer, self._listener = answer, socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        with suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                self.connections += 1
                with link:
                    self._answer(link)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder) / "clocks.sock"


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Chip]:
    with running(tmp_path / "board") as found:
        yield found


@pytest.fixture
def keepers() -> list[subprocess.Popen[bytes]]:
    return []


@pytest.fixture
def unit(place: Path, chip: Chip, keepers: list[subprocess.Popen[bytes]]) -> Iterator[Unit]:
    def keep(link: socket.socket) -> None:
        words = own_command("clocks", "--keep", "--root", str(chip.root))
        keepers.append(subprocess.Popen(words, stdin=link.fileno(), stdout=link.fileno()))
        link.close()
        keepers[-1].wait()
        if keepers[-1].returncode < 0:  # as ExecStopPost does
            subprocess.run(own_command("clocks", "--restore", "--root", str(chip.root)), check=True)

    made = Unit(place, keep)
    yield made
    made.close()


def at_best(chip: Chip) -> bool:
    return all(int(chip.names(folder)[2].read_text()) == best for folder, best in BEST.items())


def asking(daemon: Any, said: list[str]) -> threading.Thread:
    thread = threading.Thread(target=lambda: said.append(daemon.ask(FIRST)))
    thread.start()
    return thread


def test_clocks_are_held_while_it_answers(
    place: Path,
    unit: Unit,
    chip: Chip,
    start_daemon: Callable[..., Any],  # noqa: F811
) -> None:
    daemon = start_daemon("hold_clocks_s: 3", PROGRAM, TEST_CLOCKS=str(place), **SLOW)
    assert unit.connections == 0
    said: list[str] = []
    thread = asking(daemon, said)
    wait_until(lambda: at_best(chip))
    assert thread.is_alive()
    thread.join()
    assert daemon.ask(FIRST, max_tokens=2)  # one hold for answers that follow each other
    wait_until(lambda: as_before(chip))
    assert said == [QA[FIRST]]
    assert unit.connections == 1
    assert daemon.log.count("the clocks are held") == 1
    # A reload to 0 leaves them alone from the next answer on.
    (daemon.state / "daemon.yaml").write_text("hold_clocks_s: 0")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: "settings" in daemon.log)
    assert daemon.ask(FIRST) == QA[FIRST]
    assert unit.connections == 1


@pytest.mark.parametrize(("seconds", "answers"), [("0", False), ("0", True), ("1", False)])
def test_a_reload_counts_for_those_that_are_held(
    seconds: str, answers: bool, place: Path, unit: Unit, chip: Chip,
    start_daemon: Callable[..., Any],  # noqa: F811
) -> None:  # fmt: skip
    daemon = start_daemon("hold_clocks_s: 3600", PROGRAM, TEST_CLOCKS=str(place), **SLOW)
    said: list[str] = []
    thread = asking(daemon, said)
    wait_until(lambda: at_best(chip))
    if not answers:
        thread.join()
    (daemon.state / "daemon.yaml").write_text(f"hold_clocks_s: {seconds}")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: as_before(chip))
    assert thread.is_alive() == answers
    thread.join()
    assert said == [QA[FIRST]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_they_are_restored_whatever_ends_it(
    number: signal.Signals,
    place: Path,
    unit: Unit,
    chip: Chip,
    start_daemon: Callable[..., Any],  # noqa: F811
) -> None:
    daemon = start_daemon("hold_clocks_s: 3600", PROGRAM, TEST_CLOCKS=str(place), **SLOW)
    assert daemon.ask(FIRST, max_tokens=3)
    wait_until(lambda: at_best(chip))
    if number == signal.SIGKILL:
        daemon.kill()
    else:
        assert daemon.stop() == 0
    wait_until(lambda: as_before(chip))


def test_a_keeper_that_is_killed_does_not_harm_an_answer(
    place: Path, unit: Unit, chip: Chip, keepers: list[subprocess.Popen[bytes]],
    start_daemon: Callable[..., Any],  # noqa: F811
) -> None:  # fmt: skip
    daemon = start_daemon("hold_clocks_s: 1", PROGRAM, TEST_CLOCKS=str(place), **SLOW)
    said: list[str] = []
    thread = asking(daemon, said)
    wait_until(lambda: at_best(chip))
    keepers[0].kill()
    wait_until(lambda: as_before(chip))
    thread.join()
    assert said == [QA[FIRST]]


@pytest.mark.parametrize(
    "answer",
    [b"[]\n", b"x" * 200_000, b'{"event": "error", "message": "\\u001b[31mheld by others"}\n', None],
)
def test_a_keeper_that_cannot_is_a_line_in_the_log(
    answer: bytes | None,
    place: Path,
    start_daemon: Callable[..., Any],  # noqa: F811
) -> None:
    def say(link: socket.socket) -> None:
        with suppress(OSError):
            link.sendall(answer or b"")
            time.sleep(0.2)

    unit = Unit(place, say) if answer is not None else None
    daemon = start_daemon("hold_clocks_s: 1", PROGRAM, TEST_CLOCKS=str(place))
    for _ in range(3):
        assert daemon.ask(FIRST) == QA[FIRST]
    daemon.wait_until(lambda: "the clocks cannot be held" in daemon.log)
    assert daemon.log.count("the clocks cannot be held") == 1
    assert "\x1b" not in daemon.log
    if unit:
        assert unit.connections == 1
        unit.close()


def test_nobody_is_asked_unless_it_is_set(
    place: Path,
    unit: Unit,
    start_daemon: Callable[..., Any],  # noqa: F811
) -> None:
    daemon = start_daemon("", PROGRAM, TEST_CLOCKS=str(place))
    assert daemon.ask(FIRST) == QA[FIRST]
    assert unit.connections == 0


@pytest.mark.parametrize("turns", range(8))
def test_clocks_that_are_let_go_as_they_are_set(turns: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper's answer that comes in the same turn of the event loop keeps no connection open."""
    monkeypatch.setattr(clocks, "SOCKET", place)

    async def test() -> None:
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b'{"event": "set"}\n')
            let_go(turns)
            with suppress(ConnectionError):  # what we said may be unread
                await reader.read()
            writer.close()
            closed.set()

        def let_go(left: int) -> None:
            if left:
                loop.call_soon(let_go, left - 1)
            else:
                holder.change(0)

        async with await asyncio.start_unix_server(keep, place):
            holder = clocks.Clocks(3600)
            with holder.held():
                await asyncio.wait({loop.create_task(closed.wait())}, timeout=30)
            assert closed.is_set()

    asyncio.run(test())
