"""Whatever is wrong between `rkedge chat user@board` and an answer has a sentence of its own, over a real sshd."""

from __future__ import annotations

import getpass
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rkruntime.chat.remotechat import RemoteChat
from rkruntime.chat.ways import over_ssh

from .sshd import SSHD, Board, free_port, running_board
from .test_ssh import FIRST, QA, run_chat

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="openssh-server is not installed")
ME = f"{getpass.getuser()}@open"
RKEDGE = Path(sys.executable).with_name("rkedge")


@pytest.fixture(scope="module")
def board(start_daemon: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with running_board(start_daemon(port=False), tmp_path_factory.mktemp("ssh")) as found:
        yield found


def chat(board: Board, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and messages of `rkedge chat user@open`, whose shell and environment are the board's."""
    done = run_chat(board, ME, text=f"{FIRST}\n", **environment)
    return done.returncode, done.stdout, done.stderr


def attach(socket: Path | str) -> dict[str, str]:
    return {"RKEDGE_ATTACH": f"/usr/bin/env RKEDGE_SOCKET={socket} {RKEDGE}"}


def opened(board: Board, monkeypatch: pytest.MonkeyPatch, *, ask: bool = True) -> tuple[str, str]:
    """The first line that a person at a terminal sees, and the answer to a question."""
    monkeypatch.setenv("RKEDGE_SSH", " ".join([*board.ssh, "-T"]))
    talk = RemoteChat(over_ssh(board.destination), session=None, system="", options={"temperature": 0})
    try:
        return talk.title, "".join(piece for piece in talk.ask(FIRST) if isinstance(piece, str)) if ask else ""
    finally:
        talk.close()


def test_the_program_by_its_path(board: Board) -> None:
    assert chat(board, **attach(board.daemon.socket))[:2] == (0, f"{QA[FIRST]}\n")


def broken(socket: Path, tmp_path: Path) -> Mapping[str, tuple[Mapping[str, str], str, str]]:
    """What is wrong: the environment for that, the sentence, and the next step."""
    unreachable = f"ssh -o BatchMode=yes -o StrictHostKeyChecking=no -p {free_port()}"
    return {
        "no rkedge on the PATH": ({}, f"The shell on {ME} cannot find rkedge", "sudo ln -s /opt/rkedge/bin/rkedge"),
        "a wrong path": ({"RKEDGE_ATTACH": "/none/rkedge"}, "cannot find rkedge", "RKEDGE_ATTACH="),
        "not for this account": ({"RKEDGE_ATTACH": "/etc/passwd attach"}, "may not run the rkedge", "chmod"),
        "another program": ({"RKEDGE_ATTACH": "true"}, "exited with code 0 before a daemon answered", "Try it by hand"),
        "nobody listens": ({"RKEDGE_SSH": unreachable}, "ssh could not connect or log in", f"`ssh {ME} true` has to"),
        "no such key": ({"RKEDGE_SSH": f"ssh -F {tmp_path}/config"}, "ssh could not connect or log in", "above"),
        "no daemon": (attach(tmp_path / "none"), f"No daemon answers on {tmp_path}/none", "systemctl start rkedge"),
        "a socket left behind": (attach(socket), f"No daemon answers on {socket}", "systemctl start rkedge"),
    }


@pytest.mark.parametrize("what", broken(Path(), Path()))
def test_each_failure_has_its_sentence(board: Board, tmp_path: Path, what: str) -> None:
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.bind(str(left))
    config = Path(board.ssh[2])
    (tmp_path / "config").write_text(config.read_text().replace(f"{config.parent}/open", "none"))
    environment, sentence, step = broken(left, tmp_path)[what]
    code, answer, said = chat(board, **environment)
    assert (code, answer) == (8, ""), said
    assert sentence in said
    assert step in said
    # No other one: a person reads one cause.
    others = {other for _, other, _ in broken(left, tmp_path).values()} - {sentence}
    assert not [other for other in others if other in said and other not in sentence and sentence not in other], said


def test_a_daemon_that_is_still_loading(
    start_daemon: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(port=False, wait=False, RKEMU_FAULT="slow-init=4000")
    with running_board(daemon, tmp_path) as board:
        title, answer = opened(board, monkeypatch)
        assert "it is still being loaded, and the first answer waits for that" in title
        assert answer == QA[FIRST]


def test_a_daemon_that_could_not_load(
    start_daemon: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(f"library: {tmp_path}/librkllmrt.so", port=False, wait=False)
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "failed")
    with running_board(daemon, tmp_path) as board:
        code, answer, said = chat(board, **attach(daemon.socket))
        assert (code, answer) == (8, "")
        assert f"{tmp_path}/librkllmrt.so" in said
        title, _ = opened(board, monkeypatch, ask=False)
        assert "it could not be loaded" in title
