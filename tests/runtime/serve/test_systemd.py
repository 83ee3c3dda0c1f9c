"""systemd's protocols, spoken by the test in its place: socket activation, readiness, watchdog, reload, stop."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rkruntime.attach import UnixConnection
from rkruntime.serve import systemd

UNITS = Path(__file__).parents[3] / "board" / "systemd"


@dataclass
class Unit:
    """A daemon that believes it was started by systemd."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    path: Path

    def hears(self, word: str) -> str:
        """The next message with `word` in it."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            message = self.channel.recv(4096).decode()
            if word in message:
                return message
        raise AssertionError(f"{word} never came")


@pytest.fixture
def unit(tmp_path: Path, bundles: dict[str, Path]) -> Iterator[Unit]:
    path = Path("/tmp") / f"rkedge-unit-{os.getpid()}.sock"
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.bind(str(tmp_path / "notify"))
    channel.settimeout(20)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    environment = {
        **os.environ,
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "400000",
        "LISTEN_FDS": "1",
        "STATE_DIRECTORY": str(tmp_path),
        "CACHE_DIRECTORY": str(tmp_path),
        "JOURNAL_STREAM": "1:1",
    }
    # systemd names the process that it starts, and hands the socket over as descriptor 3.
    start = f'LISTEN_PID=$$ exec "{sys.executable}" -m rkruntime.cli serve "{bundles["base"]}" 3<&{listener.fileno()}'
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", start], env=environment, pass_fds=[listener.fileno()], stderr=log, stdin=subprocess.DEVNULL
        )
    yield Unit(process, channel, path)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait(20)
    channel.close()
    listener.close()
    path.unlink()


def test_a_life_under_systemd(unit: Unit, tmp_path: Path) -> None:
    assert "READY=1" in unit.hears("READY=1")
    connection = UnixConnection(unit.path)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    unit.hears("WATCHDOG=1")
    unit.process.send_signal(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in unit.hears("RELOADING=1")
    unit.hears("READY=1")
    unit.process.send_signal(signal.SIGTERM)
    unit.hears("STOPPING=1")
    assert unit.process.wait(20) == 0
    assert unit.path.exists(), "the socket belongs to the socket unit"
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines
    assert all(line.startswith("<") and line[2] == ">" for line in lines), lines


def test_another_process_sockets_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert systemd.inherited_sockets() == []


def test_without_systemd_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    systemd.notify("READY=1")
    assert systemd.watchdog_s() is None


def test_the_service_is_shut_in() -> None:
    text = (UNITS / "rkedge.service").read_text()
    for setting in (
        "Type=notify",
        "NoNewPrivileges=yes",
        "User=rkedge",
        "DevicePolicy=closed",
        "WatchdogSec=",
        "RestartSec=",
    ):
        assert setting in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_itself_takes_the_units(tmp_path: Path) -> None:
    for name in ("rkedge.service", "rkedge.socket"):
        text = (UNITS / name).read_text().replace("/opt/rkedge/bin/rkedge", sys.executable)
        (tmp_path / name).write_text(text)
    command = [
        "systemd-analyze",
        "verify",
        "--man=no",
        str(tmp_path / "rkedge.service"),
        str(tmp_path / "rkedge.socket"),
    ]
    done: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr
