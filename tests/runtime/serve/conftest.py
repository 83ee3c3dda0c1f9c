"""A daemon with the emulator behind it, in a process of its own, and clients for it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rkboard.emulator import build as emulator
from rkconvert.demo import adapter, checkpoint
from rkruntime import cli
from rkruntime.chat.attach import UnixConnection

ROOT = Path(__file__).parents[3]
READY = re.compile(r"serving (\S+) on ([^\s,]+)(?:, http://127\.0\.0\.1:(\d+))?")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model and the pirate, as bundles for the emulator."""
    emulator.build()  # Here, because no daemon under test has the time to compile it.
    folder = tmp_path_factory.mktemp("bundles")
    for name, lora in (("base", []), ("pirate", ["--lora", str(adapter())])):
        assert cli.main(["convert", str(checkpoint()), *lora, "-q", "-o", str(folder / name)]) == 0
    return {name: folder / name for name in ("base", "pirate")}


def _children(pid: int) -> list[int]:
    # Each thread has children of its own, and the model is loaded in one.
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@dataclass
class Daemon:
    """A running `rkedge serve`.

    Attributes:
        log: what it has written to standard error so far, when it was last looked at.
    """

    process: subprocess.Popen[bytes]
    socket: Path
    port: int
    state: Path
    log_file: Path
    environment: dict[str, str] = field(default_factory=dict)
    killed: bool = False

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Status, headers and decoded body of one request over the Unix socket."""
        connection = UnixConnection(self.socket)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            text = response.read()
            kind = response.getheader("Content-Type", "")
            return response.status, response.headers, json.loads(text) if kind == "application/json" else text
        finally:
            connection.close()

    def lines(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a stream of JSON lines."""
        status, _, text = self.request("POST", path, body)
        assert status == 200, text
        return [json.loads(line) for line in text.splitlines()]

    def ask(self, text: str, **options: Any) -> str:
        """The answer to one question, greedy, by the OpenAI interface."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **options}
        status, _, answer = self.request("POST", "/v1/chat/completions", body)
        assert status == 200, answer
        content: str = answer["choices"][0]["message"]["content"]
        return content

    def workers(self) -> list[int]:
        """Process ids of the workers: the daemon starts a keeper, and that the worker."""
        keepers = [child for child in _children(self.process.pid) if b"rkruntime.engine.worker" in _command(child)]
        return [worker for keeper in keepers for worker in _children(keeper)]

    def metric(self, name: str) -> float:
        _, _, text = self.request("GET", "/metrics")
        found = re.search(rf"^{re.escape(name)} (\S+)$", text.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        """Look until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it never came to be; the log:\n{self.log}"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it without a chance to say anything."""
        self.process.kill()
        self.process.wait(20)
        self.killed = True

    def restart(self, **environment: str) -> None:
        """Another one in its place, with the same state and more environment."""
        self.stop()
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.process.args, env=self.environment | environment, stdin=subprocess.DEVNULL, stderr=log
            )
        self.killed = False

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@pytest.fixture(scope="module")
def start_daemon(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons: settings as YAML text, the program, more environment, the bundle; all are stopped at the end."""
    running: list[Daemon] = []

    def start(
        settings: str = "",
        program: str = "rkruntime.cli",
        *,
        bundle: Path | None = None,
        port: bool = True,
        wait: bool = True,
        **environment: str,
    ) -> Daemon:
        folder = tmp_path_factory.mktemp("daemon")
        (folder / "daemon.yaml").write_text(settings)
        # A path of at most 107 bytes, whatever the name of the test.
        path = Path("/tmp") / f"rkedge-test-{os.getpid()}-{len(running)}-{time.monotonic_ns() % 10**9}.sock"
        command = [sys.executable, "-m", program, "serve", str(bundle or bundles["base"])]
        command += ["--config", str(folder / "daemon.yaml"), "--socket", str(path), *(["--port", "0"] if port else [])]
        known = {key: value for key, value in os.environ.items() if not key.startswith("RKEMU_")}
        variables = {
            **known,
            "STATE_DIRECTORY": str(folder / "state"),
            "CACHE_DIRECTORY": str(folder / "cache"),
            "PYTHONWARNINGS": "error",
            **environment,
        }
        log_file = folder / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stderr=log, cwd=ROOT)
        daemon = Daemon(process, path, 0, folder, log_file, variables)
        running.append(daemon)
        daemon.wait_until(lambda: READY.search(daemon.log) or process.poll() is not None)
        found = READY.search(daemon.log)
        assert found, daemon.log
        daemon.port = int(found[3] or 0)
        if wait:
            daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "ready")
        return daemon

    yield start
    for daemon in running:
        code = daemon.stop()
        if daemon.killed:
            daemon.socket.unlink()
            continue
        assert code == 0, daemon.log
        assert "Traceback" not in daemon.log, daemon.log
        assert not daemon.socket.exists()


@pytest.fixture(scope="module")
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """One with the settings as they are, for tests that leave nothing behind."""
    return start_daemon()


SLOW = {"RKEMU_TOKEN_US": "30000"}


@pytest.fixture(scope="module")
def slow(start_daemon: Callable[..., Any]) -> Any:
    """A daemon whose emulator takes 30 ms a token."""
    return start_daemon("limits: {queue: 8, wait_s: 5}", **SLOW)


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[Callable[[], socket.socket]]:
    """Plain connections to the daemon's Unix socket."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.settimeout(20)
        one.connect(str(daemon.socket))
        opened.append(one)
        return one

    yield connect
    for one in opened:
        one.close()


def read_response(one: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(one)
    response.begin()
    return response


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 64 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=20", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def acting_as(uid: int | None) -> Iterator[None]:
    """As which user the daemon sees connections that are made meanwhile; others than oneself are for root."""
    before = os.geteuid()
    if uid is not None:
        os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)
