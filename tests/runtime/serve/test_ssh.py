"""Over SSH: a real sshd on loopback with its own keys and configuration, and a key that can chat and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import questions
from rkruntime.chat.remotechat import RemoteChat
from rkruntime.chat.repl import Note
from rkruntime.chat.ways import over_ssh

from .sshd import SSHD, Board, connect, forwarding, free_port, running_board

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="openssh-server is not installed")


@pytest.fixture(scope="module")
def board(start_daemon: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    daemon = start_daemon(port=False, RKEMU_TOKEN_US="20000")
    with running_board(daemon, tmp_path_factory.mktemp("ssh")) as found:
        yield found


@pytest.fixture
def chat(board: Board, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RemoteChat]]:
    monkeypatch.setenv("RKEDGE_SSH", " ".join([*board.ssh, "-T"]))
    opened: list[RemoteChat] = []

    def connect(**options: Any) -> RemoteChat:
        given = {"session": None, "system": "", "options": {"temperature": 0}, **options}
        opened.append(RemoteChat(over_ssh(board.destination), **given))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


def said(chat: RemoteChat, question: str) -> str:
    return "".join(piece for piece in chat.ask(question) if isinstance(piece, str))


def test_a_conversation(chat: Callable[..., RemoteChat], board: Board, tmp_path: Path) -> None:
    talk = chat()
    assert "emulated runtime 1.2.3" in talk.title
    assert said(talk, FIRST) == QA[FIRST]
    assert said(talk, "Does it work?") == QA["Does it work?"]
    assert talk.last is not None
    assert talk.last.tokens > 3
    talk.save(tmp_path / "talk.json")
    talk.clear()
    talk.set_system("Be kind.")
    talk.load(tmp_path / "talk.json")
    assert talk.system == ""
    assert "answers" in talk.stats()
    headers = {"X-RKEdge-User": "ann"}
    assert len(board.daemon.request("GET", "/sessions", headers=headers)[2]["sessions"]) == 1
    talk.close()
    assert board.daemon.request("GET", "/sessions", headers=headers)[2]["sessions"] == []


def test_a_named_conversation_goes_on_another_day(chat: Callable[..., RemoteChat]) -> None:
    first = chat(session="diary", system="Be brief.")
    said(first, FIRST)
    first.close()
    second = chat(session="diary")
    assert second.system == "Be brief."
    assert len(second._read()["messages"]) == 2


def test_a_connection_that_breaks_in_mid_answer(chat: Callable[..., RemoteChat], board: Board) -> None:
    talk = chat()
    pieces: list[str] = []
    notes = 0
    for piece in talk.ask(FIRST):
        if isinstance(piece, Note):
            notes += "connection broke" in piece.text
            continue
        pieces.append(piece)
        if len(pieces) in (3, 8):
            board.drop()
    assert "".join(pieces) == QA[FIRST]
    assert notes == 2
    assert said(talk, "Does it work?") == QA["Does it work?"]
    assert [item["content"] for item in talk._read()["messages"]][:2] == [FIRST, QA[FIRST]]


def test_stopping_an_answer(chat: Callable[..., RemoteChat], board: Board) -> None:
    talk = chat()
    pieces = []
    for piece in talk.ask(FIRST):
        pieces.append(piece)
        if len(pieces) == 2:
            talk.stop()
    assert 2 <= len(pieces) < 10
    board.daemon.wait_until(lambda: not board.daemon.request("GET", "/status")[2]["queue"]["busy"])
    assert said(talk, "Does it work?") == QA["Does it work?"]


def run_chat(board: Board, *arguments: str, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RKEDGE_SSH": " ".join([*board.ssh, "-T"]), **more}
    command = [sys.executable, "-m", "rkruntime.cli", "chat", *arguments]
    return subprocess.run(command, env=environment, input=text, capture_output=True, text=True, timeout=60, check=False)


def test_the_command(board: Board) -> None:
    done = run_chat(board, board.destination, "--temperature", "0", text=f"{FIRST}\nDoes it work?\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{QA[FIRST]}\n{QA['Does it work?']}\n")
    assert len(done.stdout.splitlines()) > 2  # an empty line is a message, too
    assert done.stderr.count("ignores temperature") == 1, done.stderr


def test_a_board_that_is_not_there(board: Board) -> None:
    done = run_chat(board, "--", "nobody@nowhere.invalid")
    assert done.returncode == 8, done.stderr
    assert "ssh could not connect or log in to nobody@nowhere.invalid" in done.stderr


@pytest.mark.parametrize("where", ["-oProxyCommand=touch x@y", "x@-oProxyCommand=touch", "x@$(touch y)", "x@y;touch z"])
def test_what_a_shell_would_read_is_no_board(
    board: Board, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh takes it for a host before OpenSSH 9.6, and our hints are there to be typed."""
    monkeypatch.chdir(tmp_path)
    done = run_chat(board, "--", where)
    assert done.returncode == 2, done.stderr
    assert "is not a board that ssh can reach" in done.stderr
    assert not list(tmp_path.iterdir())


def ssh(board: Board, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*board.ssh, *arguments], input=text, capture_output=True, text=True, timeout=30, check=False)


def test_the_open_key_can_do_everything(board: Board) -> None:
    """So that the refusals below mean something."""
    assert ssh(board, "open", "echo", "hello").stdout == "hello\n"


@pytest.mark.parametrize(
    "command", [["sh"], ["sh", "-c", "id"], ["cat", "/etc/passwd"], ["rkedge", "serve", "x"], ['"']]
)
def test_a_chat_key_runs_no_command(board: Board, command: list[str]) -> None:
    done = ssh(board, "chat", *command, text="id\n")
    assert done.returncode == 4
    assert "may only be used to chat" in done.stderr
    assert "uid=" not in done.stdout
    assert "root:" not in done.stdout


@pytest.mark.parametrize("name", ["PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT", "LD_PRELOAD"])
def test_a_chat_key_hands_no_environment_on(board: Board, tmp_path: Path, name: str) -> None:
    """Even where sshd takes every variable (AcceptEnv *), which is nobody's default."""
    mark = tmp_path / "ran"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(mark)!r}, 'w')")
    environment = {**os.environ, name: str(tmp_path)}
    command = [*board.ssh, "-o", f"SendEnv={name}", "chat"]
    done = subprocess.run(
        command, env=environment, input=b'{"op": "hello"}\n', capture_output=True, timeout=30, check=False
    )
    assert b'"type": "end"' in done.stdout, done
    assert not mark.exists()
    if name == "PYTHONPATH":
        # The variable does arrive.
        command = [*board.ssh, "-o", f"SendEnv={name}", "open", sys.executable, "-c", "pass"]
        subprocess.run(command, env=environment, timeout=30, check=True)
        assert mark.exists()


def test_a_chat_key_gets_no_shell(board: Board) -> None:
    done = ssh(board, "chat", text="id\n")
    assert "uid=" not in done.stdout
    assert '"status": 400' in done.stdout
    done = ssh(board, "-tt", "chat", text="id\n")
    assert "uid=" not in done.stdout


def test_a_chat_key_copies_no_file(board: Board, tmp_path: Path) -> None:
    config = board.ssh[2]
    (tmp_path / "file").write_text("x")
    copy = tmp_path / "copy"
    for protocol in ([], ["-O"]):
        for source, target in ((tmp_path / "file", f"chat:{copy}"), ("chat:/etc/passwd", copy)):
            command = ["scp", "-q", "-F", config, *protocol, str(source), str(target)]
            assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0
            assert not copy.exists()
    done = subprocess.run(["sftp", "-F", config, "chat"], input=b"ls /\n", capture_output=True, timeout=30, check=False)
    assert b"etc" not in done.stdout


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def health(board: Board, host: str) -> bytes:
    """What /health says through a forwarded port."""
    port = free_port()
    with forwarding(board, "-L", f"127.0.0.1:{port}:{board.daemon.socket}", host), connect(board, port) as one:
        one.sendall(HEALTH)
        try:
            return one.recv(1000)
        except ConnectionResetError:
            return b""


def test_the_open_key_forwards_the_socket_to_any_http_client(board: Board) -> None:
    assert b"200 OK" in health(board, "open")


def test_a_chat_key_forwards_no_port_from_here(board: Board) -> None:
    assert health(board, "chat") == b""


def test_a_chat_key_forwards_no_port_from_there(board: Board) -> None:
    with forwarding(board, "-R", f"{free_port()}:127.0.0.1:9", "chat") as process:
        assert process.wait(10) == 255


def test_a_chat_key_is_no_proxy(board: Board) -> None:
    port, behind = free_port(), socket.create_server(("127.0.0.1", 0))
    with behind, forwarding(board, "-D", str(port), "chat"), connect(board, port) as one:
        one.sendall(b"\x05\x01\x00")
        assert one.recv(2) == b"\x05\x00"
        one.sendall(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + behind.getsockname()[1].to_bytes(2, "big"))
        with suppress(ConnectionResetError):
            one.recv(10)
        behind.settimeout(1)
        with pytest.raises(TimeoutError):
            behind.accept()
