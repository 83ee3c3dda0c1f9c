"""systemd's protocols, spoken by the test in its place: socket activation, readiness, watchdog, reload, stop."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rkruntime.chat.attach import UnixConnection
from rkruntime.errors import UsageError
from rkruntime.serve import systemd
from rkruntime.serve.doors import door_of

UNITS = Path(__file__).parents[3] / "board" / "systemd"


@dataclass
class Unit:
    """A daemon that believes it was started by systemd."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    path: Path
    port: int

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
    tcp = socket.create_server(("127.0.0.1", 0))
    environment = {
        **os.environ,
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "400000",
        "LISTEN_FDS": "2",
        "STATE_DIRECTORY": str(tmp_path),
        "CACHE_DIRECTORY": str(tmp_path),
        "JOURNAL_STREAM": "1:1",
    }
    # systemd names the process that it starts, and hands the sockets over as descriptors 3 and 4.
    given = f"3<&{listener.fileno()} 4<&{tcp.fileno()}"
    start = f'LISTEN_PID=$$ exec "{sys.executable}" -m rkruntime.cli serve "{bundles["base"]}" {given}'
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", start],
            env=environment,
            pass_fds=[listener.fileno(), tcp.fileno()],
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    yield Unit(process, channel, path, tcp.getsockname()[1])
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait(20)
    channel.close()
    listener.close()
    tcp.close()
    path.unlink()


def test_a_life_under_systemd(unit: Unit, tmp_path: Path) -> None:
    assert "READY=1" in unit.hears("READY=1")
    connection = UnixConnection(unit.path)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    # Each socket is what it is: the Unix socket says who comes, TCP has its rules.
    for headers, status in (({}, 200), ({"Host": "evil.example"}, 403), ({"X-RKEdge-User": "ann"}, 403)):
        tcp = http.client.HTTPConnection("127.0.0.1", unit.port, timeout=20)
        tcp.request("GET", "/sessions", headers=headers)
        assert tcp.getresponse().status == status
        tcp.close()
    unit.hears("WATCHDOG=1")
    unit.process.send_signal(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in unit.hears("RELOADING=1")
    unit.hears("EXTEND_TIMEOUT_USEC=")
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


@pytest.mark.parametrize("kind", ["datagrams", "packets", "a connection", "not listening", "udp"])
def test_sockets_that_cannot_serve_are_refused(tmp_path: Path, kind: str) -> None:
    """A unit with ListenDatagram=, ListenSequentialPacket= or Accept=yes."""
    family = socket.AF_INET if kind == "udp" else socket.AF_UNIX
    kinds = {"datagrams": socket.SOCK_DGRAM, "udp": socket.SOCK_DGRAM, "packets": socket.SOCK_SEQPACKET}
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(family, kinds.get(kind, socket.SOCK_STREAM)) as one:
        if kind == "packets":
            one.bind(str(tmp_path / "socket"))
            one.listen()
        with pytest.raises(UsageError, match="is not a listening stream socket"):
            door_of(ours if kind == "a connection" else one, {})


def test_files_that_are_no_sockets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    for fd in (read, 9999):
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setattr(systemd, "_FIRST_FD", fd)
        with pytest.raises(UsageError, match="is not a socket"):
            systemd.inherited_sockets()
    os.close(read)
    os.close(write)


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
        "LimitCORE=0",
        "TasksMax=",
        "UMask=0077",
        "PrivateNetwork=yes",
        "OOMPolicy=continue",
    ):
        assert f"\n{setting}" in text


def analyze(*arguments: str | Path) -> str:
    """What systemd-analyze says on standard output and, after that, on standard error."""
    command = ["systemd-analyze", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder with the units as a person installs them."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    for name in ("rkedge.service", "rkedge.socket"):
        text = (UNITS / name).read_text().replace("/opt/rkedge/bin/rkedge", sys.executable)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_systemd_itself_takes_the_units(installed: Path, tcp: bool) -> None:
    if tcp:
        (installed / "rkedge.socket.d").mkdir()
        shutil.copy(UNITS / "tcp.conf", installed / "rkedge.socket.d")
    said = analyze("verify", "--man=no", installed / "rkedge.service", installed / "rkedge.socket")
    assert "Unknown" not in said
    assert "gnoring" not in said


def test_systemd_itself_counts_little_exposure(installed: Path) -> None:
    said = analyze("security", "--offline=true", "--no-pager", installed / "rkedge.service")
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert found, said
    assert float(found[1]) <= 1.2


def test_every_group_of_the_unit_is_made(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("systemd is not installed")
    unit = (UNITS / "rkedge.service").read_text()
    wanted = re.findall(r"^(?:Group|SupplementaryGroups)=(.*)$", unit, re.MULTILINE)
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "rkedge.sysusers")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {line.split(":")[0] for line in (tmp_path / "etc/group").read_text().splitlines()}
    assert {name for names in wanted for name in names.split()} <= made


def test_the_folder_of_the_socket_is_not_the_daemons() -> None:
    """systemd's chown follows links: a daemon that may put one in the socket's place would be given any file."""
    assert "RuntimeDirectory=" not in (UNITS / "rkedge.service").read_text()
    assert "DirectoryMode=0755" in (UNITS / "rkedge.socket").read_text()
