"""What the first board has to say before another one is touched: boards that say something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.deploy.conftest import bundles, library  # noqa: F401

from rkboard.deploy.plan import bundle_name
from rkboard.fleet.boards import Boards
from rkboard.fleet.inventory import Entry
from rkboard.fleet.rollout import Rollout
from rkruntime.bundle.manifest import open_bundle

LOOK = {
    "machine": "x86_64", "libc": [2, 36], "python": "/usr/bin/python3", "python_version": "3.11", "foreign": False,
    "packaged": False, "systemd": True, "deployed": True, "status": {"state": "ready"},
}  # fmt: skip
FINE: dict[str, Any] = {"message": {"content": "1 2 3"}, "eval_count": 5, "eval_duration": 10**9}


class Board:
    """Says that all is done but the last step, and does what it is told."""

    def __init__(self, destination: str, said: Mapping[str, Any], served: str) -> None:
        self.destination, self.asked = destination, list[str]()
        self._said, self._served = said, served

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, op: str, **given: Any) -> Mapping[str, Any]:
        self.asked.append(op)
        if op in self._said and (op != "look" or "change" in self.asked):
            found: Mapping[str, Any] = self._said[op]
            return found
        return {
            "look": {**LOOK, "current": {"bundles": self._served}},
            "check": {"done": [step["kind"] != "serve" for step in given.get("steps", [])]},
            "selftest": {"result": {"verdict": "same", "problems": []}},
            "ask": {"status": 200, "answer": FINE},
        }.get(op, {})


@pytest.fixture
def deployed(bundles: dict[str, Path]) -> Callable[[Mapping[str, Any]], tuple[list[str], list[str]]]:  # noqa: F811
    """What becomes of two boards of which the first says this; and which of them were changed."""
    opened = open_bundle(bundles["base"])

    def run(said: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        changed: list[str] = []

        def connect(destination: str, _: object) -> Any:
            board = Board(destination, said if destination == "u@b0" else {}, bundle_name(opened))
            call = board.call

            def noted(op: str, **given: Any) -> Mapping[str, Any]:
                changed.extend([destination] if op == "change" else [])
                return call(op, **given)

            board.call = noted  # type: ignore[method-assign]
            return board

        entries = [Entry(f"b{at}", "g", f"u@b{at}", bundles["base"], None, True, "", 0, "") for at in range(2)]
        boards = Boards(lambda _: None, connect)
        assert [one.state for one in Rollout(entries, boards.plan, 2, careful=False).run()] == ["done"] * 2
        return [one.state for one in Rollout(entries, boards.deploy, 2, careful=True).run()], changed

    return run


def test_a_board_that_says_what_it_should(
    deployed: Callable[[Mapping[str, Any]], tuple[list[str], list[str]]],
) -> None:
    assert deployed({}) == (["done", "done"], ["u@b0", "u@b1"])


@pytest.mark.parametrize(
    "said",
    [
        {"ask": {"status": 200, "answer": None}},
        {"ask": {"status": 200, "answer": "something"}},
        {"ask": {"status": 200, "answer": {**FINE, "message": {"content": " \n"}}}},
        {"ask": {"status": 200, "answer": {**FINE, "eval_count": 0}}},
        {"ask": {"status": 500, "answer": FINE}},
        {"ask": {}},
        {"selftest": {"result": {"verdict": "undecided", "problems": []}}},
        {"selftest": {"result": {"verdict": "", "problems": []}}},
        {"selftest": {"result": {"verdict": "same", "problems": [{"message": "It says x."}]}}},
        {"look": {**LOOK, "current": {"bundles": "another-00000000"}}},
        {"look": {**LOOK, "current": None}},
        {"look": {**LOOK, "status": None}},
    ],
)
def test_a_board_that_says_something_else(
    said: Mapping[str, Any], deployed: Callable[[Mapping[str, Any]], tuple[list[str], list[str]]]
) -> None:
    assert deployed(said) == (["failed", "not touched"], ["u@b0"])


@pytest.mark.parametrize(
    ("after", "states"),
    [
        ({"current": {"bundles": "old"}, "status": {"state": "ready"}}, ["done", "done"]),
        ({"current": {"bundles": "new"}, "status": {"state": "ready"}}, ["failed", "not touched"]),
        ({"current": {"bundles": "old"}, "status": None}, ["failed", "not touched"]),
        ({}, ["failed", "not touched"]),
    ],
)
def test_a_rollback_of_which_a_board_says_something_else(after: Mapping[str, Any], states: list[str]) -> None:
    class Back(Board):
        def call(self, op: str, **given: Any) -> Mapping[str, Any]:
            self.asked.append(op)
            before = {"current": {"bundles": "new"}, "previous": {"bundles": "old"}, "status": {"state": "ready"}}
            return (after if "switch" in self.asked else before) if op == "look" else {}

    boards = Boards(lambda _: None, lambda destination, _: Back(destination, {}, ""))  # type: ignore[arg-type,return-value]
    entries = [Entry(f"b{at}", "g", f"u@b{at}", None, None, True, "", 0, "") for at in range(2)]
    assert [one.state for one in Rollout(entries, boards.before, 2, careful=False).run()] == ["done"] * 2
    assert [one.state for one in Rollout(entries, boards.roll_back, 2, careful=True).run()] == states
