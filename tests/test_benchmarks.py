"""What benchmarks say of their figures: spreads, aims, the exit status, and the page that is made of them."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench import __main__ as bench
from tests.bench import _page
from tests.bench._machine import Moment, run
from tests.bench._report import MET, MISSED, NOT_MEASURED, Report, Spread, at_least, at_most, turns

VALUES = st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=50)


@given(VALUES)
def test_a_spread_is_what_numpy_says(values: list[float]) -> None:
    spread = Spread.of(values)
    found = [spread.low, spread.quarter, spread.median, spread.three_quarters, spread.high]
    assert found == pytest.approx(np.percentile(values, [0, 25, 50, 75, 100]))
    assert spread.median == pytest.approx(statistics.median(values))
    assert spread.count == len(values)


def test_runs_alternate() -> None:
    order: list[str] = []
    ways = {name: (lambda name=name: order.append(name)) for name in "AB"}  # type: ignore[misc]
    assert {name: len(found) for name, found in turns(ways, 3, warm_up=True).items()} == {"A": 3, "B": 3}
    assert "".join(order) == "AB" + "ABABAB"


def test_a_ratio_is_of_neighbours() -> None:
    """The machine is half as fast from the second pair on: the medians of the two would give 1.5."""
    ours, theirs = [2.0, 3.0, *[4.0] * 9], [2.0, *[4.0] * 10]
    row = Report("one", "About.").ratio("written", "ours / theirs", ours, theirs)
    assert row.spread is not None
    assert (row.spread.median, row.spread.low, row.spread.high, row.spread.count) == (1.0, 0.75, 1.0, 11)
    with pytest.raises(ValueError, match="zip"):
        Report("one", "About.").ratio("written", "ours / theirs", ours, theirs[1:])


@pytest.mark.parametrize(("count", "outcome"), [(9, NOT_MEASURED), (10, MISSED)])
def test_under_ten_pairs_there_is_no_claim(count: int, outcome: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("one", "About.")
    report.compare("written", "s", {"ours": [3.0] * count, "cp": [1.0] * count}, aims={"cp": at_most(1.5)})
    assert report.rows[-1].outcome == outcome
    assert ("no claim" in report.rows[-1].note) == (outcome == NOT_MEASURED)
    assert report.close() == (outcome == MISSED)
    assert ("missed" in capsys.readouterr().out) == (outcome == MISSED)


def test_aims_have_a_direction() -> None:
    report = Report("one", "About.")
    assert report.figure("time", "ours", [1.0, 2.0, 3.0], "s", at_most(2)).outcome == MET
    assert report.figure("time", "ours", [1.0, 2.0, 3.0], "s", at_least(2.1)).outcome == MISSED
    assert report.figure("time", "ours", 7, "s").outcome == ""


def test_a_peer_that_is_missing_is_said() -> None:
    report = Report("one", "About.")
    report.compare("decode", "tokens/s", {"ours": [1.0] * 10}, aims={"theirs": at_least(1)})
    assert (report.rows[-1].outcome, report.rows[-1].spread) == (NOT_MEASURED, None)
    assert "theirs" in report.rows[-1].note
    assert report.close() == 0


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_page, "FIGURES", tmp_path / "benchmarks.json")
    monkeypatch.setattr(_page, "PAGE", tmp_path / "benchmarks.md")
    return tmp_path


def document(name: str, seconds: float, aim: float) -> dict[str, object]:
    report = Report(name, "About | it.", peers="Install them.", limits="The weather.", versions={"peft": "1.2"})
    report.figure("time | wall", "ours", [seconds] * 3, "s", at_most(aim))
    return report.document()


def test_runs_are_kept_until_the_next(pages: Path) -> None:
    _page.collect(
        {"one": document("one", 1, 2), "two": document("two", 3, 2), "gone": document("gone", 1, 2)}, ["one", "two"]
    )
    before = (pages / "benchmarks.md").read_text()
    assert "Of 2 aims, 1 were met, 1 missed and 0 not measured." in before
    assert "| time \\| wall | ours | 3 s | 3 .. 3 | 3 .. 3 | 3 | <= 2 | missed |" in before
    assert "peft 1.2" in before
    assert "gone" not in before
    _page.collect({"two": document("two", 1.5, 2)}, ["one", "two"])
    after = (pages / "benchmarks.md").read_text()
    assert "Of 2 aims, 2 were met, 0 missed and 0 not measured." in after
    assert set(json.loads((pages / "benchmarks.json").read_text())) == {"one", "two"}
    assert sorted(path.name for path in pages.iterdir()) == ["benchmarks.json", "benchmarks.md"]


def test_a_missed_aim_fails_all(
    pages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two that ended, of which one missed; one that broke before it had a result."""
    ends = {
        "merge": (document("merge", 1, 2), True),
        "startup": (document("startup", 3, 2), False),
        "diagnosis": (None, False),
    }
    monkeypatch.setattr(bench, "_run", lambda name, _result: ends[name])
    for names, status in ((["merge"], 0), (["merge", "startup"], 1), (["diagnosis"], 1)):
        monkeypatch.setattr("sys.argv", ["bench", *names])
        assert bench.main() == status
    assert "failed: diagnosis (it did not end)" in capsys.readouterr().out
    assert set(json.loads((pages / "benchmarks.json").read_text())) == {"merge", "startup"}


def test_the_page_in_the_repository_is_that_of_its_figures() -> None:
    found = json.loads(_page.FIGURES.read_text())
    assert _page.PAGE.read_text() == "\n".join(_page.page(found)) + "\n"


def test_a_command_has_its_cost() -> None:
    """Its own: not the memory of this process, which is larger."""
    ballast = bytearray(b"x") * 300_000_000
    cost = run([sys.executable, "-c", "sum(range(3_000_000)); bytearray(b'x') * 50_000_000"])
    assert ballast
    assert cost.cpu_s > 0
    assert cost.wall_s <= cost.disk_s
    assert 50 < cost.peak_mb < 200
    for command, told in ((["-c", "raise SystemExit('no room')"], "no room"), (["/nowhere"], "failed")):
        with pytest.raises(SystemExit, match=told):
            run([sys.executable, *command])
    with pytest.raises(SystemExit, match="not started"):
        run(["/nowhere/program"])


def test_our_own_work_is_not_that_of_others() -> None:
    """Half a second of one CPU is ours; what others take meanwhile is not known here."""
    began = Moment(0, 10.0, 0.0, 3.0)
    assert began.load_until(Moment(2, 12.5, 0.5, 4.0)) | {"average": 0} == {
        "others_cpus": 0.75, "stolen_cpus": 0.25, "average": 0, "seconds": 2
    }  # fmt: skip
