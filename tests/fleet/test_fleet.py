"""Many boards from end to end: trees behind a real sshd, with real daemons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.deploy.tree import Tree

from rkboard.deploy.session import Session
from rkconvert.demo import questions
from rkruntime import cli

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def command(
    reached: list[str], trees: dict[str, Tree], tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs `rkedge fleet` with an inventory of the boards; its status and the boards of its document."""

    def run(word: str, bundle: Path, *words: str, lost: bool = False) -> tuple[int, dict[str, Any]]:
        names = [*trees, *(["ann@lost"] if lost else [])]
        boards = {f"board-{at}": {"ssh": to} for at, to in enumerate(names, 1)}
        text = {"bundle": str(bundle), "library": str(library), "test": False, "groups": {"all": {"boards": boards}}}
        (tmp_path / "boards.yaml").write_text(json.dumps(text))
        yes = [] if word == "status" or "--plan" in words else ["--yes"]
        status = cli.main(["fleet", word, str(tmp_path / "boards.yaml"), *yes, *words, "--json"])
        rows = json.loads(capsys.readouterr().out)["boards"]
        return status, {row["board"]: row for row in rows}

    return run


def states(rows: dict[str, Any]) -> list[str]:
    return [row["state"] for row in rows.values()]


def test_three_boards(
    command: Command, trees: dict[str, Tree], bundles: dict[str, Path], reached: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Planned, deployed, again, another bundle that a board refuses, back."""
    status, rows = command("deploy", bundles["base"], lost=True)
    assert status == 8
    assert states(rows) == ["not touched"] * 3 + ["failed"]
    assert not any(tree.home.exists() for tree in trees.values())
    status, rows = command("deploy", bundles["base"], "--plan")
    assert (status, states(rows)) == (0, ["not touched"] * 3)
    assert all(any("bundle" in change for change in row["changes"]) for row in rows.values())
    assert not any(tree.home.exists() for tree in trees.values())
    reached.clear()
    status, rows = command("deploy", bundles["base"])
    assert (status, states(rows)) == (0, ["done"] * 3)
    assert reached[3] == "ann@board-1"
    assert all(tree.ask(FIRST) == QA[FIRST] for tree in trees.values())
    status, rows = command("deploy", bundles["base"])
    assert (status, states(rows)) == (0, ["nothing to do"] * 3)
    status, rows = command("status", bundles["base"])
    assert status == 0
    assert {row["daemon"] for row in rows.values()} == {"ready"}
    assert all(row["emulated"] for row in rows.values())

    # The first one that is changed refuses it: no other one is touched.
    damaged = trees["ann@board-1"].home / "incoming"
    damaged.rmdir() if damaged.is_dir() else None
    damaged.write_text("not a folder")
    status, rows = command("deploy", bundles["pirate"])
    assert (status, states(rows)) == (8, ["failed", "not touched", "not touched"])
    assert all(tree.ask(FIRST) == QA[FIRST] for tree in trees.values())
    damaged.unlink()

    # One of the others does: it is named, and the rest answers with one or the other.
    blocked = trees["ann@board-2"].home / "incoming"
    blocked.rmdir()
    blocked.write_text("not a folder")
    status, rows = command("deploy", bundles["pirate"], "--at-once", "1")
    assert (status, states(rows)) == (8, ["done", "failed", "not touched"])
    assert "board-2" not in [name for name, row in rows.items() if row["state"] == "done"]
    said = [(tree.ask(FIRST) or "").startswith("Arr") for tree in trees.values()]
    assert said == [True, False, False]
    blocked.unlink()
    status, rows = command("rollback", bundles["pirate"])  # the others have nothing to go back to
    assert (status, states(rows)) == (4, ["not touched", "failed", "failed"])
    status, rows = command("rollback", bundles["pirate"], "--board", "board-1")
    assert (status, list(rows), states(rows)) == (0, ["board-1"], ["done"])
    assert trees["ann@board-1"].ask(FIRST) == QA[FIRST]
    trees["ann@board-3"].stop()
    status, rows = command("status", bundles["base"])
    assert (status, states(rows)) == (8, ["done", "done", "failed"])


def test_a_self_test_that_fails_stops_it(
    command: Command, trees: dict[str, Tree], bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call = Session.call

    def told(self: Session, op: str, **given: Any) -> dict[str, Any]:
        if op == "selftest":
            return {"event": "done", "result": {"verdict": "other-answer", "problems": [{"message": "It says x."}]}}
        return call(self, op, **given)

    monkeypatch.setattr(Session, "call", told)
    path = tmp_path / "boards.yaml"
    write = Path.write_text

    def tested(self: Path, text: str, *more: Any, **given: Any) -> int:
        return write(self, text.replace('"test": false', '"test": true') if self == path else text, *more, **given)

    monkeypatch.setattr(Path, "write_text", tested)
    status, rows = command("deploy", bundles["base"])
    assert (status, states(rows)) == (4, ["failed", "not touched", "not touched"])
    assert "other-answer: It says x." in rows["board-1"]["message"]
    assert trees["ann@board-1"].ask(FIRST) == QA[FIRST]
    assert not trees["ann@board-2"].home.exists()


def test_nobody_at_the_terminal_changes_nothing(
    reached: list[str], trees: dict[str, Tree], bundles: dict[str, Path], library: Path, tmp_path: Path
) -> None:
    boards = {f"b{at}": {"ssh": to} for at, to in enumerate(trees)}
    text = {"bundle": str(bundles["base"]), "library": str(library), "groups": {"all": {"boards": boards}}}
    (tmp_path / "boards.yaml").write_text(json.dumps(text))
    assert cli.main(["fleet", "deploy", str(tmp_path / "boards.yaml")]) == 2
    assert not any(tree.home.exists() for tree in trees.values())
