"""The daemon's log: its end, and what comes after it, of which nothing stays on the board."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.runtime.serve import sshd

from rkboard.deploy.session import Session
from rkruntime.errors import ServiceError

from .conftest import wait_until
from .tree import Tree

# A journalctl that says a line, then what is written into a file, and that no signal but SIGKILL ends.
JOURNALCTL = """\
#!{python}
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
    signal.signal(number, signal.SIG_IGN)
open({root!r} + "/run/journalctl.words", "w").write(" ".join(sys.argv[1:]))
print("an older line", flush=True)
if "--follow" in sys.argv:
    open({root!r} + "/run/journalctl.pid", "w").write(str(os.getpid()))
    with open({root!r} + "/run/journal") as journal:
        while True:
            sys.stdout.write(journal.read())
            sys.stdout.flush()
            time.sleep(0.05)
"""
# What `rkedge logs -f` does, on a board that is a tree.
FOLLOW = """\
import sys
from rkboard.commands import logs
from rkboard.deploy import session
real = session.Session
session.Session = lambda destination, say, **more: real(destination, say, sys.argv[1], **more)
sys.exit(logs.run.main(sys.argv[2:], standalone_mode=False))
"""


@pytest.fixture
def journal(tree: Tree) -> Path:
    tool = tree.root / "usr/bin/journalctl"
    tool.write_text(JOURNALCTL.format(python=sys.executable, root=str(tree.root)))
    tool.chmod(0o755)
    path = tree.root / "run/journal"
    path.touch()
    return path


@contextmanager
def following(tree: Tree, destination: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`rkedge logs -f`, and the folder in /proc of the process that it needs on the board."""
    words = [sys.executable, "-c", FOLLOW, str(tree.root), destination, "-f", "-n", "7"]
    pid_file = tree.root / "run/journalctl.pid"
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            wait_until(lambda: pid_file.exists() and pid_file.read_text())
            yield process, Path("/proc") / pid_file.read_text()
        finally:
            process.kill()


def test_the_end_of_a_log(tree: Tree, destination: str, journal: Path) -> None:
    told: list[str] = []
    with Session(destination, told.append, str(tree.root)) as session:
        session.call("log", lines=7)
    assert "".join(told) == "an older line"
    words = (tree.root / "run/journalctl.words").read_text().split()
    assert {"--unit=rkedge.service", "--lines=7", "--no-pager"} <= set(words)


def test_a_log_that_cannot_be_read(tree: Tree, destination: str, journal: Path) -> None:
    (tree.root / "usr/bin/journalctl").write_text("#!/bin/sh\necho 'no journal files' >&2; exit 3\n")
    told: list[str] = []
    with Session(destination, told.append, str(tree.root)) as session, pytest.raises(ServiceError, match="with 3"):
        session.call("log", lines=7)
    assert told == ["no journal files"]


def test_lines_come_as_they_are_written_and_are_harmless(tree: Tree, destination: str, journal: Path) -> None:
    with following(tree, destination) as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline() == "an older line\n"
        with journal.open("a") as file:
            for text in ("one\n", "tw", "o\n", "\x1b]0;three\x07\n", "x" * 5000 + "\n", "end\n"):
                file.write(text)
                file.flush()
        said = ""
        while not said.endswith("end\n"):
            said += process.stdout.readline()
        assert said.startswith("one\ntwo\n]0;three\n")
        assert said.count("x") == 5000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_on_the_board(number: signal.Signals, tree: Tree, destination: str, journal: Path) -> None:
    with following(tree, destination) as (process, there):
        assert there.exists()
        process.send_signal(number)
        assert process.wait(30) == (0 if number == signal.SIGINT else -number)
        wait_until(lambda: not there.exists())


def test_nothing_stays_when_the_connection_breaks(
    tree: Tree, destination: str, journal: Path, host: sshd.Board
) -> None:
    with following(tree, destination) as (process, there):
        host.drop()
        assert process.wait(30) != 0
        wait_until(lambda: not there.exists())


def test_nothing_stays_when_what_runs_on_the_board_is_killed(tree: Tree, destination: str, journal: Path) -> None:
    with following(tree, destination) as (process, there):
        parent = int(there.joinpath("stat").read_text().split()[3])
        Path(f"/proc/{parent}")
        subprocess.run(["kill", "-KILL", str(parent)], check=True)
        assert process.wait(30) != 0
        wait_until(lambda: not there.exists())


def test_a_tool_that_ends(tree: Tree, destination: str, journal: Path) -> None:
    journal.unlink()  # which the tool cannot do without
    told: list[str] = []
    with (
        Session(destination, told.append, str(tree.root), endless=True) as session,
        pytest.raises(ServiceError, match="The log has ended"),
    ):
        session.follow(1)
    assert told[0].splitlines()[0] == "an older line"
    assert "FileNotFoundError" in "".join(told)
