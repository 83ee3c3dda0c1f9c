"""The committed measurements: they are of all blocks, and the tool that is named gives them again."""

from __future__ import annotations

from typing import Any

import pytest
from tests.rknn.measure import TRIED, demo_blocks, measure, shaped_blocks

from rkconvert.compat.rknn import measured
from rkconvert.toolkit.rknn import find_rknn

PYTHON = find_rknn()
ROWS: list[dict[str, Any]] = list(measured()["rows"])


def test_each_block_was_tried_with_each_type() -> None:
    blocks = [block.name for block in (*demo_blocks(), *shaped_blocks())]
    asked = {(block, soc, dtype) for block in blocks for soc, types in TRIED.items() for dtype in types}
    assert {(row["block"], row["soc"], row["type"]) for row in ROWS} == asked
    assert len(ROWS) == len(asked)


def test_the_emulator_is_no_farther_from_float_than_the_vendor_s_simulator() -> None:
    """Whether the emulator is a fair stand-in: docs/compat.md says so in these words."""
    rows = [row for row in ROWS if row["type"] == "w8a8"]
    assert len(rows) >= 39
    assert all(row["vendor"][0] > 0.99 for row in rows)
    assert all(row["ours"][0] >= row["vendor"][0] - 0.0005 for row in rows)


def test_four_bits_are_not_for_the_rk3588() -> None:
    refused = {(row["soc"], row["type"]) for row in ROWS if "words" in row}
    assert ("rk3588", "w4a16") in refused
    assert not refused & {("rk3588", "w8a8"), ("rk3576", "w8a8"), ("rk3576", "w4a16")}


@pytest.mark.long
@pytest.mark.skipif(not PYTHON, reason="there is no rknn-toolkit2 here: rkedge toolkit setup --rknn")
def test_the_tool_says_it_again() -> None:
    assert PYTHON
    again = measure(PYTHON, [next(demo_blocks())], {"rk3588": ("w8a8", "w4a16")})
    for row in again:
        known = next(item for item in ROWS if all(item[key] == row[key] for key in ("block", "soc", "type")))
        assert known.keys() == row.keys()
        assert known.get("words") == row.get("words")
        assert known.get("vendor") == pytest.approx(row.get("vendor"), abs=1e-3)
