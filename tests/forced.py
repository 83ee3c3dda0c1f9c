"""Destinations of ssh behind a real sshd on loopback, where every command is a script of the test's."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.runtime.serve import sshd

needs_sshd = pytest.mark.skipif(not Path(sshd.SSHD).exists(), reason="openssh-server is not installed")


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    """A machine behind sshd; the host `open` runs what it is told."""
    daemon = SimpleNamespace(socket="/nowhere", wait_until=wait_until)
    with sshd.running_board(daemon, tmp_path_factory.mktemp("ssh")) as found:
        yield found


@pytest.fixture
def forced(board: sshd.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a destination where every command is this shell script."""

    def host(script: str) -> str:
        folder = Path(board.ssh[2]).parent
        name = f"host{time.monotonic_ns()}"
        (tmp_path / name).write_text(script)
        key = sshd.make_key(folder / name)
        with (folder / "authorized_keys").open("a") as keys:
            keys.write(f'command="sh {tmp_path / name}" {key}\n')
        config = (folder / "config").read_text().split("Host ")[1]
        (tmp_path / "config").write_text("Host " + re.sub(r"\bopen\b", name, config))
        monkeypatch.setenv("RKEDGE_SSH", f"ssh -T -F {tmp_path / 'config'}")
        return f"{getpass.getuser()}@{name}"

    return host
