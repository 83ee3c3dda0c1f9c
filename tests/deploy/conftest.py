"""A tree behind a real sshd on loopback, and bundles for it."""

from __future__ import annotations

import getpass
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.runtime.serve import sshd

from rkboard.emulator import build as emulator
from rkconvert.demo import adapter, checkpoint
from rkruntime import cli

from .tree import Tree, plant, wheels


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="session")
def library() -> Path:
    return emulator.build()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, library: Path) -> dict[str, Path]:
    """The demo model and the pirate."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, lora in (("base", []), ("pirate", ["--lora", str(adapter())])):
        assert cli.main(["convert", str(checkpoint()), *lora, "-q", "-o", str(folder / name)]) == 0
    return {name: folder / name for name in ("base", "pirate")}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheels."""
    folder = tmp_path_factory.mktemp("program") / "wheels"
    wheels(folder)
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    """An sshd, whose host `open` runs what it is told."""
    if not Path(sshd.SSHD).exists():
        pytest.skip("openssh-server is not installed")
    daemon = SimpleNamespace(socket="/nowhere", wait_until=wait_until)
    with sshd.running_board(daemon, tmp_path_factory.mktemp("ssh")) as found:
        yield found


@pytest.fixture
def destination(host: sshd.Board, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RKEDGE_SSH", shlex.join([*host.ssh, "-T"]))
    return f"{getpass.getuser()}@open"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    """A fresh board. The socket's path would be too long for some tests' folders, so nothing depends on it."""
    made = plant(tmp_path)
    yield made
    made.stop()
    assert os.path.isdir(made.root)  # noqa: PTH112
