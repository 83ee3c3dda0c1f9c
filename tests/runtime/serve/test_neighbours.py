"""Daemons beside each other, and a daemon that is stopped while it loads."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkruntime.bundle.manifest import open_bundle
from rkruntime.errors import ServiceError
from rkruntime.model import open_model
from rkruntime.stop import Stop


def second(daemon: Any, bundle: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another daemon beside one, with its folders and with a socket of its own."""
    command = [sys.executable, "-m", "rkruntime.cli", "serve", str(bundle), "--socket", f"{daemon.socket}.2"]
    variables = {**daemon.environment, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("shared", ["STATE_DIRECTORY", "CACHE_DIRECTORY"])
def test_a_folder_has_one_daemon(daemon: Any, bundles: dict[str, Path], tmp_path: Path, shared: str) -> None:
    (folder,) = Path(daemon.environment[shared]).iterdir()
    other = ({"STATE_DIRECTORY", "CACHE_DIRECTORY"} - {shared}).pop()
    partial = folder / "ann" / ".talk.json.partial-1"
    partial.parent.mkdir(exist_ok=True)
    partial.write_text("being written")
    ended = second(daemon, bundles["base"], **{other: str(tmp_path)})
    assert ended.returncode == 2, ended.stderr
    assert f"Another daemon keeps its files in {folder}." in ended.stderr
    assert partial.exists()
    assert not Path(f"{daemon.socket}.2").exists()
    assert daemon.request("GET", "/health")[0] == 200
    partial.unlink()
    partial.parent.rmdir()


def test_a_daemon_that_was_killed_locks_nobody_out(start_daemon: Callable[..., Any]) -> None:
    first = start_daemon(port=False)
    folders = {name: first.environment[name] for name in ("STATE_DIRECTORY", "CACHE_DIRECTORY")}
    first.process.kill()
    first.process.wait()
    next_one = start_daemon(port=False, **folders)
    assert next_one.request("GET", "/health")[0] == 200
    # What the fixture asks of each at its end.
    first.socket.unlink()
    first.process.returncode = 0


def test_folders_that_cannot_be_locked_are_said_to_be(start_daemon: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    daemon = start_daemon(port=False, CACHE_DIRECTORY=str(tmp_path / "file"))
    assert "against other daemons" in daemon.log
    assert daemon.ask("Does it work?")


def test_the_socket_of_another_daemon_stays(start_daemon: Callable[..., Any]) -> None:
    first, other = start_daemon(port=False), start_daemon(port=False)
    first.socket.unlink()
    other.socket.rename(first.socket)
    assert first.stop() == 0
    assert first.socket.exists()
    first.socket.rename(other.socket)
    assert other.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_the_load(
    start_daemon: Callable[..., Any],
    double: Callable[..., Path],
    bundles: dict[str, Path],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    bundle = Path(shutil.copytree(bundles["base"], tmp_path / "bundle"))
    manifest = bundle / "rkedge.yaml"
    manifest.write_text(manifest.read_text().replace("npu_cores: 3", "npu_cores: 1"))  # for machines of two cores
    daemon = start_daemon(
        f"library: {double('1.2.3')}\nforce: true", bundle=bundle, port=False, wait=False, RKDOUBLE="init-hang"
    )
    daemon.wait_until(daemon.workers)
    (worker,) = daemon.workers()
    answers: list[Any] = []
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    asking = threading.Thread(target=lambda: answers.append(daemon.request("POST", "/v1/chat/completions", body)))
    asking.start()
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["queue"]["waiting"])
    daemon.process.send_signal(number)
    # A load may take 600 s, and answers have 30 s to come to their end.
    assert daemon.process.wait(25) == 0
    asking.join()
    assert answers[0][0] == 503
    assert not Path(f"/proc/{worker}").exists()
    assert "WorkerCrashedError" not in daemon.log
    assert "never retrieved" not in daemon.log


def test_a_load_that_was_stopped_begins_nothing(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(bundles["base"])
    stop = Stop()
    stop.ask()
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    with pytest.raises(ServiceError):
        bundle.verify(progress=stop.check)
    with pytest.raises(ServiceError):
        open_model(bundle, stop=stop)
