"""Boards as the tests of deploying have them: trees behind a real sshd, each with a daemon of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.deploy.conftest import bundles, destination, host, library, program  # noqa: F401
from tests.deploy.tree import Tree, plant

from rkboard.commands import fleet
from rkboard.deploy import work
from rkboard.deploy.session import Session
from rkboard.fleet.boards import Boards


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[dict[str, Tree]]:
    """Three boards, by the destination that an inventory has for them."""
    found = {}
    for at in range(1, 4):
        (tmp_path / f"{at}").mkdir()
        found[f"ann@board-{at}"] = plant(tmp_path / f"{at}")
        (found[f"ann@board-{at}"].root / "run/systemd/system").mkdir(parents=True)
    yield found
    for tree in found.values():
        tree.stop()


@pytest.fixture
def reached(
    trees: dict[str, Tree],
    destination: str,  # noqa: F811
    program: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """Lets the command reach the boards; the destinations, as it connects to them. Others lead nowhere."""
    asked: list[str] = []

    def connect(to: str, say: Callable[[str], None]) -> Session:
        asked.append(to)
        if to not in trees:
            return Session("nobody@nowhere.invalid", say)
        return Session(destination, say, str(trees[to].root))

    wheels = {path.name: path for path in sorted(program.iterdir())}
    monkeypatch.setattr(work, "wheels_for", lambda *_: wheels)
    monkeypatch.setattr(work, "own_wheel", lambda: ("", b"".join(path.read_bytes() for path in wheels.values())))
    real = fleet._boards
    monkeypatch.setattr(fleet, "_boards", lambda: Boards(real().say, connect))
    return asked
