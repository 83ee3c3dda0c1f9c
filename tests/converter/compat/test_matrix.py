"""What runs where: against facts that are restated here with their sources, and the rules against the evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.converter.compat.gemma2 import CONFIGS, MODELS, RELEASES, case_of, matrices, matrix_of
from tests.pages import DOCS, matrix_page

from rkconvert.compat import report
from rkconvert.compat.case import Wanted
from rkconvert.compat.cells import Cell, Evidence, Judged, Level, Status
from rkconvert.compat.emulated import EmulatedLoads
from rkconvert.compat.matrix import Matrix, fill
from rkconvert.model.groups import misfit
from rkconvert.plan import ModelSource, PlanRequest, plan_for
from rkconvert.plan.prediction import vendor_rows
from rkruntime.errors import UsageError


@pytest.fixture(scope="module")
def made() -> list[Matrix]:
    """All three sizes, both SoCs, each type."""
    return list(matrices())


@pytest.fixture(scope="module")
def every(made: list[Matrix]) -> dict[tuple[str, str, str, str], Judged]:
    """The cells of these."""
    found = [(matrix.case.source.name, item) for matrix in made for item in matrix.cells]
    return {(name, item.cell.soc, item.cell.type, item.cell.release): item for name, item in found}


@pytest.mark.parametrize("group", [128, 256, 512])
def test_the_first_public_statement(group: int) -> None:
    """Only w8a8 works with Gemma 2 9B: each grouped type ends at load with RKLLM 1.1.1, w8a8 loads."""
    grouped, plain = matrix_of(
        "gemma-2-9b-it", socs=["rk3588"], types=[f"w8a8_g{group}", "w8a8"], releases=["1.1.1"]
    ).cells
    assert (grouped.status, plain.status) == (Status.FAILS, Status.WORKS)
    reported, emulated = grouped.evidence[:2]
    assert (reported.level, emulated.level) == (Level.REPORTED, Level.EMULATED)
    assert emulated.status is Status.FAILS
    assert any("errno: 14, errstr: Bad address" in line for line in emulated.log)
    if group == 128:
        assert any("failed to malloc npu memory, size: 232128512, flags: 0x2" in line for line in emulated.log)


def test_gemma_2_2b_in_groups_of_128_loads_with_1_1_0(every: dict[Any, Judged]) -> None:
    """README.md @ 1.1.1, measured with 1.1.0: 5.49 tokens/s, against 9.67 with w8a8."""
    cell = every["gemma-2-2b-it", "rk3588", "w8a8_g128", "1.1.0"]
    assert (cell.status, cell.level, cell.disputed) == (Status.SLOWER, Level.FIGURE, frozenset())
    assert "5.49 tokens/s, against 9.67 with w8a8" in cell.evidence[0].says
    assert any(item.level is Level.EMULATED and item.status is Status.WORKS for item in cell.evidence)


def test_no_row_of_the_vendor_s_is_said_to_fit_no_group() -> None:
    grouped = [row for row in vendor_rows() if row.kind.group]
    assert len(grouped) > 10
    assert [(row.model, row.kind.name) for row in grouped if misfit(row.shape, row.kind)] == []


def test_each_rule_has_evidence_that_is_not_the_rule(every: dict[Any, Judged]) -> None:
    """No source of the matrix reads the table of rules: each verdict is held against something else."""
    allowed = {
        "ok": {Status.WORKS, Status.SLOWER},
        "warn": {Status.WORKS, Status.SLOWER},
        "refuse": {Status.SLOWER, Status.FAILS, Status.REFUSED},
        "impossible": {Status.REFUSED},
    }
    wrong = []
    for name, soc, release in product(MODELS, ("rk3588", "rk3576"), RELEASES):
        plan = plan_for(ModelSource(name, CONFIGS[name]), PlanRequest(name, board=soc, toolkit=release, context=4096))
        for verdict in plan.verdicts:
            item = every[name, soc, verdict.type, release]
            assert item.evidence, (name, soc, verdict.type, release)
            if item.status not in allowed[verdict.status]:
                wrong.append((name, soc, verdict.type, release, verdict.status, item.status.value))
    assert wrong == []


def evidence(status: Status, level: Level, **more: Any) -> Evidence:
    return Evidence(status, level, "It does.", "somewhere", **more)


CELL = Cell("rk3588", "1.2.3", "w8a8", 3, 4096, "merged")
W, S, F, R, X = Status.WORKS, Status.SLOWER, Status.FAILS, Status.REFUSED, Status.WRONG
B, V, T, Q, E, P = Level


@pytest.mark.parametrize(
    ("pieces", "status", "level", "disputed"),
    [
        ([], Status.UNKNOWN, None, 0),
        ([(W, P)], W, P, 0),
        ([(W, P), (F, B)], F, B, 1),  # the board is right, and the plan is shown to be wrong
        ([(W, B), (F, B)], W, B, 1),  # two boards disagree
        ([(S, P), (W, E)], S, P, 0),  # the emulator speaks of NPU memory only
        ([(F, P), (W, E)], F, P, 0),  # RAM
        ([(W, P), (F, E)], F, E, 1),
        ([(W, V), (F, E)], W, V, 1),
        ([(X, B), (W, E), (W, P)], X, B, 1),
        ([(R, T), (W, P), (W, E)], R, T, 0),
        ([(R, T), (W, V)], W, V, 1),
    ],
)
def test_the_most_trusted_decides_and_nothing_is_averaged(
    pieces: list[tuple[Status, Level]], status: Status, level: Level | None, disputed: int
) -> None:
    for given in (pieces, pieces[::-1] if len({level for _, level in pieces}) == len(pieces) else pieces):
        item = Judged.of(CELL, [evidence(*piece, partial=piece[1] is E) for piece in given])
        assert (item.status, item.level, len(item.disputed)) == (status, level, disputed)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"types": ["w9a9"]}, "There is no type"),
        ({"socs": ["rk3566"]}, "There is no SoC"),
        ({"releases": ["9.9"]}, "9.9"),
        ({"contexts": [31]}, "32 to"),
        ({"contexts": [100]}, "in steps of 32"),
        ({"contexts": range(32, 64_032, 32)}, "cells; the limit"),
    ],
)
def test_dimensions_that_there_are_not(wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Wanted(**wanted).cells()


def test_a_load_is_done_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case, said = case_of("gemma-2-2b-it"), []
    monkeypatch.setattr("rkconvert.compat.emulated.provided_library", _built(monkeypatch))
    cells = Wanted(types=["w8a8"], socs=["rk3588"], releases=["1.2.3"]).cells()
    first = fill(case, cells, [EmulatedLoads(case, said.append)])
    again = fill(case, cells, [EmulatedLoads(case, said.append)])
    assert first == again
    assert said == ["loading w8a8 of 1.2.3 in the emulator"]
    other = fill(case, Wanted(types=["w8a8"], socs=["rk3588"], releases=["1.2.3"], contexts=[512]).cells(), [
        EmulatedLoads(case, said.append)
    ])  # fmt: skip
    assert len(said) == 2
    assert other.cells[0].evidence != first.cells[0].evidence


@pytest.mark.parametrize("damaged", ["{", '{"loads": "yes", "says": 5, "log": 7}', "[" * 100_000, '{"loads": true}'])
def test_a_load_that_is_not_remembered_whole_is_done_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damaged: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case, said = case_of("gemma-2-2b-it"), []
    monkeypatch.setattr("rkconvert.compat.emulated.provided_library", _built(monkeypatch))
    cells = Wanted(types=["w8a8"], socs=["rk3588"], releases=["1.2.3"], contexts=[512]).cells()
    first = fill(case, cells, [EmulatedLoads(case, said.append)])
    (kept,) = tmp_path.rglob("compat/*.json")
    kept.write_text(damaged)
    assert fill(case, cells, [EmulatedLoads(case, said.append)]) == first
    assert len(said) == 2


def _built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    from rkruntime.engine.open import provided_library

    with monkeypatch.context() as usual:
        usual.delenv("XDG_CACHE_HOME")
        library = provided_library("emulator", "1.2.3")
    return lambda *args: library


def test_a_file_that_the_emulator_refuses_for_another_reason_is_not_evidence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rkruntime.errors import LoadError

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("rkconvert.compat.emulated.provided_library", _built(monkeypatch))
    monkeypatch.setattr("rkconvert.compat.emulated.write_sizes_only", lambda path, *_: path.write_bytes(b"x" * 9999))
    with pytest.raises(LoadError):
        matrix_of("gemma-2-2b-it", types=["w8a8"], socs=["rk3588"], releases=["1.2.3"])


def test_the_page_is_up_to_date(made: list[Matrix]) -> None:
    assert (DOCS / "matrix.md").read_text() == matrix_page(made), "python -m tests.pages"


def test_json_says_the_same(made: list[Matrix]) -> None:
    matrix = made[1]
    data = json.loads(json.dumps(report.as_dict(matrix)))
    assert [row["status"] for row in data["cells"]] == [item.status.value for item in matrix.cells]
    assert all(row["evidence"] for row in data["cells"])
