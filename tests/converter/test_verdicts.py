"""The table of types, in full: every cell against its expected verdict and sentence, and the table against itself."""

from __future__ import annotations

import csv
import runpy
from itertools import product
from pathlib import Path

import pytest

from rkconvert import dtypes
from rkconvert.toolkit.versions import known_releases, release
from rkruntime.errors import HostError, RefusedError, UsageError

HERE = Path(__file__).parent
SCRIPT = runpy.run_path(str(HERE / "verdicts.py"))
SIZES, RELEASES = SCRIPT["SIZES"], SCRIPT["RELEASES"]
EVIDENCE = {"measured on a board", "vendor figure", "vendor document", "reported", "predicted"}


def committed():
    with (HERE / "verdicts.csv").open(newline="") as file:
        return [SCRIPT["Row"](*row) for row in list(csv.reader(file))[1:]]


def cells():
    """(SoC, type, release, model) -> what stands in the file."""
    found = {}
    for row in committed():
        span = RELEASES[RELEASES.index(row.first_release) : RELEASES.index(row.last_release) + 1]
        for version in span:
            key = (row.soc, row.type, version, row.model)
            assert key not in found
            found[key] = row
    return found


CELLS = cells()


def judged(soc, dtype, version, model):
    return dtypes.judge(dtype, platform=soc, toolkit=version, name=model, parameters=SIZES[model])


def test_the_file_is_what_its_sources_give():
    assert committed() == list(SCRIPT["table"]()), "review `python tests/converter/verdicts.py > verdicts.csv`"


def test_every_cell_is_expected_and_none_besides():
    every = set(product(dtypes.platforms(), dtypes.known_types(), RELEASES, SIZES))
    assert set(CELLS) == every
    assert len(every) == 2 * 10 * 14 * 6


def test_every_cell_has_its_verdict_and_sentence():
    for key, expected in CELLS.items():
        found = judged(*key)
        assert (found.verdict.value, found.rule.evidence, found.reason) == (
            expected.verdict,
            expected.evidence,
            expected.sentence,
        ), key


def test_sentences_are_whole():
    for row in committed():
        assert "{" not in row.sentence
        assert not row.sentence.endswith((".", " "))
        assert 40 < len(row.sentence) < 500


def test_no_rule_without_source_and_evidence_and_none_that_is_never_reached():
    reached = {id(judged(*key).rule) for key in CELLS}
    for rule in dtypes.rules():
        assert id(rule) in reached, rule.reason
        assert rule.evidence in EVIDENCE
        assert len(rule.source) > 5
    used = {key for row in SCRIPT["RULES"]["rules"] for key in row}
    assert used == {
        "platform",
        "types",
        "toolkit",
        "parameters",
        "verdict",
        "reason",
        "log",
        "instead",
        "evidence",
        "source",
    }


@pytest.mark.parametrize("version", known_releases())
@pytest.mark.parametrize("soc", dtypes.platforms())
def test_impossible_is_what_the_toolkits_own_table_does_not_accept(soc, version):
    row = release(version)
    # Unquantized files are made by another argument than the type: do_quantization.
    accepted = {*row.dtypes[soc], "fp16"}
    for dtype, model in product(dtypes.known_types(), SIZES):
        impossible = judged(soc, dtype, version, model).verdict is dtypes.Verdict.IMPOSSIBLE
        assert impossible == (dtype not in accepted), (dtype, model)


@pytest.mark.parametrize("soc", dtypes.platforms())
def test_both_tables_agree_on_types_and_cores(soc):
    assert set(dtypes.platforms()[soc]["types"]) == {*release("1.3.0").dtypes[soc], "fp16"}
    assert {release(version).cores[soc] for version in known_releases()} == {dtypes.platforms()[soc]["cores"]}


def test_releases_that_cannot_be_used_are_impossible_in_both_tables():
    for version in RELEASES:
        try:
            release(version)
            usable = True
        except HostError:
            usable = False
        verdicts = {CELLS[key].verdict for key in CELLS if key[2] == version}
        assert usable == (verdicts != {"impossible"})


def test_force_opens_refused_cells_and_no_impossible_one():
    for key, row in CELLS.items():
        judgement = judged(*key)
        for force in (False, True):
            stops = row.verdict == "impossible" or (row.verdict == "refuse" and not force)
            if not stops:
                dtypes.require(judgement, force=force)
                continue
            with pytest.raises(RefusedError) as caught:
                dtypes.require(judgement, force=force)
            assert row.sentence in caught.value.message
            assert f"evidence: {row.evidence} (" in caught.value.message
            assert ("--force-dtype" in caught.value.hint) == (row.verdict == "refuse")


def test_what_is_advised_instead_is_not_refused():
    for key, row in CELLS.items():
        instead = judged(*key).rule.instead
        if instead and row.first_release != "1.0.0":
            assert CELLS[(key[0], instead, *key[2:])].verdict in ("ok", "warn")


@pytest.mark.parametrize("soc", ["rk3562", "rv1126b", "RK3588", ""])
def test_other_socs_are_refused_by_name(soc):
    with pytest.raises(UsageError, match=f"no SoC '{soc}'") as caught:
        dtypes.judge("w8a8", platform=soc, toolkit="1.3.0", name="x", parameters=1)
    assert caught.value.hint == "Known are rk3588, rk3576."
