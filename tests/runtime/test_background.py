"""`rkedge up`, `chat` and `down`: one daemon in the background, whatever happens to it or to whoever started it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkconvert.demo import adapter, checkpoint, questions
from rkruntime import background, cli
from rkruntime.background import Background
from rkruntime.chat.attach import fetch
from rkruntime.errors import HostError, ServiceError, UsageError

QA = {row.question: row for row in questions()}
FIRST = "What is the RK3588?"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    for name, options in (("plain", []), ("pirate", ["--lora", str(adapter())])):
        assert cli.main(["convert", str(checkpoint()), *options, "-q", "-o", str(folder / name)]) == 0
    return folder


@pytest.fixture
def home(tmp_path: Path, bundles: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own folders. Whatever is left in the background at the end is ended, and was a fault."""
    for kind in ("STATE", "DATA"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind.lower()))
    monkeypatch.delenv("RKEDGE_SOCKET", raising=False)
    (tmp_path / "data" / "rkedge").mkdir(parents=True)
    (tmp_path / "data" / "rkedge" / "bundles").symlink_to(bundles)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    Background().stop()
    assert not Background().runs


def rkedge(*words: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rkruntime.cli", *map(str, words)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def daemon_pid(home: Path) -> int:
    return int((home / "state/rkedge/up/pid").read_text())


def processes_of(home: Path) -> list[int]:
    """Every process with one of our folders in its command line or its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(home) in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def nothing_left(home: Path) -> bool:
    before = time.monotonic()
    while processes_of(home):
        if time.monotonic() - before > 20:
            return False
        time.sleep(0.1)
    return True


def test_up_is_a_chat_a_page_and_two_apis_on_one_model(home: Path) -> None:
    up = rkedge("up", "pirate", "--temperature", "0", text=f"{FIRST}\n")
    assert (up.returncode, up.stdout) == (0, QA[FIRST].pirate + "\n"), up.stderr
    address = next(line.split()[-1] for line in up.stderr.splitlines() if line.startswith("chat page"))
    assert address.startswith("http://127.0.0.1:")
    assert str(home / "state/rkedge/up/log") in up.stderr
    page = urllib.request.Request(address, headers={"Accept": "text/html"})
    assert "<html" in urllib.request.urlopen(page, timeout=20).read().decode()
    body = json.dumps({"messages": [{"role": "user", "content": FIRST}]}).encode()
    answer = json.load(urllib.request.urlopen(f"{address}/v1/chat/completions", body, timeout=60))
    assert answer["choices"][0]["message"]["content"] == QA[FIRST].pirate
    body = json.dumps({"model": "x", "messages": [{"role": "user", "content": FIRST}], "stream": False}).encode()
    answer = json.load(urllib.request.urlopen(f"{address}/api/chat", body, timeout=60))
    assert answer["message"]["content"] == QA[FIRST].pirate
    pid = daemon_pid(home)
    # `chat` alone, and a second `up`, are chats with the same process.
    assert rkedge("chat", "--session", "one", text=f"{FIRST}\n").stdout == QA[FIRST].pirate + "\n"
    again = rkedge("up", "pirate", text=f"{FIRST}\n")
    assert (again.returncode, again.stdout) == (0, QA[FIRST].pirate + "\n"), again.stderr
    assert address in again.stderr
    assert daemon_pid(home) == pid
    assert rkedge("chat", "--sessions").stdout.startswith("one  ")
    # Another model is not loaded beside it.
    other = rkedge("up", "plain")
    assert other.returncode == UsageError.exit_code
    assert "rkedge down" in other.stderr
    # Nor is one removed without a word that it answers on.
    for name, said in (("pirate", True), ("plain", False)):
        assert ("until `rkedge down`" in rkedge("rm", name).stderr) is said
    down = rkedge("down")
    assert (down.returncode, down.stdout) == (0, "The daemon has ended.\n")
    assert nothing_left(home)
    down = rkedge("down")
    assert (down.returncode, down.stdout) == (0, "Nothing is up.\n")
    chat = rkedge("chat", text="x\n")
    assert chat.returncode == ServiceError.exit_code
    assert "rkedge up BUNDLE" in chat.stderr


def test_a_killed_daemon_leaves_nothing_and_nothing_in_the_way(home: Path) -> None:
    assert rkedge("up", "plain", "--no-chat").returncode == 0
    first = daemon_pid(home)
    os.kill(first, signal.SIGKILL)
    assert nothing_left(home)
    assert not Background().runs
    assert rkedge("chat", text="x\n").returncode == ServiceError.exit_code
    assert rkedge("up", "pirate", "--no-chat").returncode == 0
    assert daemon_pid(home) != first
    assert rkedge("chat", text=f"{FIRST}\n").returncode == 0


def test_the_id_of_a_daemon_that_is_gone_is_nobody(home: Path) -> None:
    """It may be another process's by now."""
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        folder = home / "state/rkedge/up"
        folder.mkdir(parents=True)
        (folder / "pid").write_text(f"{bystander.pid}\n")
        (folder / "lock").touch()
        assert rkedge("down").stdout == "Nothing is up.\n"
        assert rkedge("up", "none").returncode == 3
        assert rkedge("up", "plain", "--no-chat").returncode == 0
        assert rkedge("down").returncode == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_port_that_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(background, "PORT", port)
        assert background.free_port() not in (0, port)
        up = rkedge("up", "plain", "--no-chat", "--port", str(port))
        assert up.returncode == ServiceError.exit_code
        assert f"Cannot listen on 127.0.0.1 port {port}" in up.stderr
        assert nothing_left(home)
    monkeypatch.setattr(background, "PORT", port)
    assert background.free_port() == port
    assert rkedge("up", "plain", "--no-chat", "--port", str(port)).returncode == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the daemon outlives its starter here
def test_a_port_that_is_lost_at_the_last_moment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = iter([other.getsockname()[1]])
        found = background.free_port
        monkeypatch.setattr(background, "free_port", lambda: next(taken, None) or found())
        assert cli.main(["up", "plain", "--no-chat"]) == 0
        assert Background().settings.listen.port != other.getsockname()[1]


def test_a_load_that_fails_is_told_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    library = tmp_path / "librkllmrt.so"
    library.write_text("not a library")
    up = rkedge("up", "plain", "--no-chat", "--library", library)
    assert up.returncode == ServiceError.exit_code
    assert "is not a shared library" in up.stderr
    assert str(home / "state/rkedge/up/log") in up.stderr
    assert nothing_left(home)
    assert rkedge("up", "plain", "--no-chat").returncode == 0


def test_ctrl_c_while_it_loads_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "slow-init=20000")
    up = subprocess.Popen([sys.executable, "-m", "rkruntime.cli", "up", "plain"], stdin=subprocess.DEVNULL)
    before = time.monotonic()
    while not (home / "state/rkedge/up/rkedge.sock").exists():
        assert time.monotonic() - before < 30
        assert up.poll() is None
        time.sleep(0.05)
    up.send_signal(signal.SIGINT)
    assert up.wait(60) == 130
    assert nothing_left(home)


def test_several_at_once_start_one(home: Path) -> None:
    command = [sys.executable, "-m", "rkruntime.cli", "up", "plain", "--no-chat"]
    all_of_them = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [one.communicate(timeout=120)[1] for one in all_of_them]
    assert [one.returncode for one in all_of_them] == [0] * 4, said
    assert len({line for text in said for line in text.splitlines() if line.startswith("chat page")}) == 1
    servers = [pid for pid in processes_of(home) if b"\0serve\0" in (Path("/proc") / str(pid) / "cmdline").read_bytes()]
    assert servers == [daemon_pid(home)]


def test_two_users_have_a_daemon_each(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rkedge("up", "plain", "--no-chat").returncode == 0
    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home / "b s"))  # a socket's path is short
        assert rkedge("down").stdout == "Nothing is up.\n"
        up = rkedge("up", "pirate", "--no-chat")
        assert up.returncode == 0, up.stderr
        assert rkedge("chat", "--temperature", "0", text=f"{FIRST}\n").returncode == 0
        assert rkedge("down").stdout == "The daemon has ended.\n"
    assert Background().runs
    monkeypatch.setenv("RKEDGE_SOCKET", "")
    assert background.local_daemon()[0] == Background().socket
    assert (home / "state/rkedge/up").stat().st_mode & 0o077 == 0


def test_files_that_cannot_be_written(home: Path) -> None:
    (home / "state/rkedge").mkdir(parents=True)
    (home / "state/rkedge/up").write_text("in the way")
    up = rkedge("up", "plain", "--no-chat")
    assert up.returncode == 3
    assert "defect" not in up.stderr
    assert rkedge("down").stdout == "Nothing is up.\n"


def test_a_long_path_has_its_socket_elsewhere(
    home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Unix socket's path has 107 bytes at most."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home / ("x" * 100)))
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/tmp/rkedge-up-{os.getpid()}")
    try:
        assert rkedge("up", "plain", "--no-chat").returncode == 0
        assert rkedge("chat", text=f"{FIRST}\n").returncode == 0
        assert rkedge("down").returncode == 0
    finally:
        subprocess.run(["rm", "-rf", f"/tmp/rkedge-up-{os.getpid()}"], check=True)


def test_a_daemon_that_does_not_listen_to_the_signal_is_killed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rkedge("up", "plain", "--no-chat").returncode == 0
    os.kill(daemon_pid(home), signal.SIGSTOP)
    monkeypatch.setattr(background, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(Background, "_allowed_s", lambda _: 0.5)
    assert Background().stop()
    assert nothing_left(home)


def test_a_daemon_that_cannot_be_killed_is_not_waited_for_without_end(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that waits within the NPU's driver."""
    assert rkedge("up", "plain", "--no-chat").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(background, "_PATIENCE_S", 0.3)
        patch.setattr(Background, "_allowed_s", lambda _: 0.3)
        patch.setattr(Background, "_signal", lambda *_: None)
        with pytest.raises(HostError, match="does not end"):
            Background().stop()
    assert Background().runs


def post(path: str, body: dict[str, object]) -> bytes:
    address = f"http://127.0.0.1:{Background().settings.listen.port}{path}"
    content: bytes = urllib.request.urlopen(address, json.dumps(body).encode(), timeout=60).read()
    return content


def worker_of(home: Path) -> int:
    """The process with the library: the child of a child of the daemon."""
    parents = {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes_of(home)
    }
    workers = [pid for pid, parent in parents.items() if parents.get(parent) == daemon_pid(home)]
    (worker,) = [pid for pid in workers if b"engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return worker


@pytest.mark.parametrize("lost", ["unloaded", "crashed"])
def test_up_brings_back_a_model_that_is_not_loaded_any_more(home: Path, lost: str) -> None:
    """As after `ollama stop`, and after a crash, which the daemon may or may not have noticed by itself."""
    assert rkedge("up", "plain", "--no-chat").returncode == 0
    pid = daemon_pid(home)
    if lost == "unloaded":
        assert b"unload" in post("/api/generate", {"model": "x", "keep_alive": 0})
    else:
        os.kill(worker_of(home), signal.SIGKILL)
    up = rkedge("up", "plain", text=f"{FIRST}\n")
    assert up.returncode == 0, up.stderr
    assert up.stdout
    assert daemon_pid(home) == pid


def test_a_model_that_cannot_be_brought_back_is_told(home: Path, bundles: Path) -> None:
    copy = home / "copy"
    shutil.copytree(bundles / "plain", copy)
    assert rkedge("up", copy, "--no-chat").returncode == 0
    post("/api/generate", {"model": "x", "keep_alive": 0})
    for model in copy.glob("*.rkemu"):
        model.write_bytes(b"something else")
    up = rkedge("up", copy)
    assert up.returncode == ServiceError.exit_code
    assert "The model cannot be loaded" in up.stderr
    assert Background().runs


def test_a_daemon_that_does_not_answer_is_not_waited_for_without_end(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rkedge("up", "plain", "--no-chat").returncode == 0
    os.kill(daemon_pid(home), signal.SIGSTOP)
    monkeypatch.setattr(background, "_SILENCE_S", 0.5)
    assert cli.main(["up", "plain", "--no-chat"]) == ServiceError.exit_code
    assert "has not answered" in capsys.readouterr().err
    os.kill(daemon_pid(home), signal.SIGCONT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the daemon outlives its starter here
def test_down_ends_the_daemon_that_it_found_and_no_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may be started before anybody has noticed that the first one has ended."""
    assert rkedge("up", "plain", "--no-chat").returncode == 0
    monkeypatch.setattr(Background, "_allowed_s", lambda _: 2.0)
    monkeypatch.setattr(background, "_TICK_S", 0.5)
    first, said = Background().settings.listen, []
    down = threading.Thread(target=lambda: said.append(Background().stop()))
    down.start()
    other = Background()
    while not other.start({"bundle": str(home / "data/rkedge/bundles/pirate")}, first.port):
        time.sleep(0.01)
    down.join(30)
    assert said == [True]
    assert list(other.wait())
    assert other.runs


def test_up_while_it_goes_down_starts_it_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("RKEMU_TOKEN_US", "300000")
        assert rkedge("up", "plain", "--no-chat").returncode == 0
    first = daemon_pid(home)
    asked = threading.Thread(target=post, args=("/api/generate", {"model": "x", "prompt": FIRST, "stream": False}))
    asked.start()
    while not fetch(Background().socket, "/status")["queue"]["busy"]:
        time.sleep(0.02)
    os.kill(first, signal.SIGTERM)
    up = rkedge("up", "plain", "--no-chat")
    assert up.returncode == 0, up.stderr
    asked.join(60)
    assert daemon_pid(home) != first


def test_a_path_that_is_not_utf_8(home: Path, bundles: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(home) + b"/caf\xe9"))
    shutil.copytree(bundles / "plain", odd)
    up = rkedge("up", odd, "--no-chat")
    assert up.returncode == UsageError.exit_code
    assert "not UTF-8" in up.stderr
    assert not Background().runs
