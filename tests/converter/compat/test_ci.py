"""The tests that somebody's CI runs, run as docs/compat.md says, in a pytest of their own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.converter.compat.boards import Loopback, loopback
from tests.runtime.serve.sshd import SSHD

from rkboard.emulator.build import build
from rkconvert.compat.results import read_result
from rkconvert.demo import checkpoint
from rkruntime import cli
from rkruntime.probes import QUESTIONS

PAGE = Path(__file__).parents[3] / "docs" / "compat.md"
RELEASE = "1.3.0"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "my-bundle"
    assert cli.main(["convert", str(checkpoint()), "--release", RELEASE, "-q", "-o", str(path)]) == 0
    return path


@pytest.fixture
def ci(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, str], str]]:
    """Runs the page's command; returns its status, the outcome of each test, and what it printed."""
    monkeypatch.delenv("RKEMU_GUESS", raising=False)
    line = re.search(r"^pytest (--pyargs rkconvert\.compat .*?--bundle) my-bundle +#", PAGE.read_text(), re.MULTILINE)
    assert line

    def run(*words: str, given: tuple[str, ...] | None = None) -> tuple[int, dict[str, str], str]:
        command = [*shlex.split(line[1]), str(bundle)] if given is None else list(given)
        report = tmp_path / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *command, *words, f"--junitxml={report}", "-p", "no:cacheprovider"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, outcomes(report), done.stdout + done.stderr

    return run


def outcomes(report: Path) -> dict[str, str]:
    if not report.exists():
        return {}
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {case.attrib["name"]: next((child.tag for child in case), "passed") for case in cases}


CELL = f"w8a8-rk3588-{RELEASE}-3-4096-merged"


def test_one_test_for_each_cell_and_probe(ci: Callable[..., tuple[int, dict[str, str], str]]) -> None:
    code, found, said = ci()
    assert code == 0, said
    probes = {name for name, question in QUESTIONS.items() if not question.risky}
    assert found.keys() == {f"test_cell[{CELL}]", *(f"test_probe[{CELL}-{name}]" for name in probes)}
    # The demo model's attention scores are too small for its soft-cap to do anything.
    assert {name for name, outcome in found.items() if outcome != "passed"} == {f"test_probe[{CELL}-attention-cap]"}


def test_what_makes_answers_worse_fails(
    ci: Callable[..., tuple[int, dict[str, str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_GUESS", "window-ignored,logits-uncapped")
    code, found, said = ci()
    assert code == 1
    failed = {name for name, outcome in found.items() if outcome == "failure"}
    assert {f"test_probe[{CELL}-window]", f"test_probe[{CELL}-logits-cap]"} <= failed
    assert "Does it honour the sliding window? ignored" in said


def test_a_load_that_fails_fails_its_cell_and_skips_its_probes(
    ci: Callable[..., tuple[int, dict[str, str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "alloc-14")
    code, found, _ = ci()
    assert code == 1
    assert found.pop(f"test_cell[{CELL}]") == "failure"
    assert set(found.values()) == {"skipped"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-p", "rkconvert.compat.pytest_plugin", "--bundle", "nowhere"), "neither a bundle nor a folder of bundles"),
        (("-p", "rkconvert.compat.pytest_plugin"), "--bundle"),
        (("--bundle", "x"), "unrecognized arguments: --bundle"),
    ],
)
def test_what_is_missing_is_said(
    ci: Callable[..., tuple[int, dict[str, str], str]], words: tuple[str, ...], says: str
) -> None:
    code, _, said = ci(given=("--pyargs", "rkconvert.compat", *words))
    assert code == 4
    assert says in said


def test_other_runs_of_pytest_know_nothing_of_it(ci: Callable[..., tuple[int, dict[str, str], str]]) -> None:
    _, _, said = ci(given=("--help",))
    assert "--bundle" not in said


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    with loopback(tmp_path / "loopback", build(RELEASE, progress=lambda _: None), monkeypatch) as found:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "host"))
        yield found


def test_a_board_without_a_name_is_not_this_machine(ci: Callable[..., tuple[int, dict[str, str], str]]) -> None:
    """As from a variable of a workflow that is not set."""
    code, found, said = ci("--board", "")
    assert (code, set(found.values())) == (1, {"error"})
    assert "The board has an empty name" in said


@pytest.mark.skipif(not Path(SSHD).exists(), reason="there is no sshd here")
def test_on_a_board(ci: Callable[..., tuple[int, dict[str, str], str]], board: Loopback, tmp_path: Path) -> None:
    board.environment["RKEMU_GUESS"] = "logits-uncapped"
    code, found, said = ci(*board.words, "--results", str(tmp_path / "results"))
    assert code == 1, said
    assert {name for name, outcome in found.items() if outcome == "failure"} == {f"test_probe[{CELL}-logits-cap]"}
    (path,) = (tmp_path / "results").glob("*.json")
    (cap,) = (probe for probe in read_result(path).runs[0].probes if probe.name == "logits-cap")
    assert cap.result == "uncapped"
    assert board.left() == []
