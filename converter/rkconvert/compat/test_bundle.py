"""Tests for a CI that has boards: does a bundle do there what it should? See docs/compat.md.

`pytest --pyargs rkconvert.compat -p rkconvert.compat.pytest_plugin --bundle BUNDLE [--board user@host]`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from rkconvert.compat.matrix import known
from rkconvert.compat.tried import case_of, cell_of
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import RKEdgeError
from rkruntime.probes import QUESTIONS, UNDECIDED, is_harmful
from rkruntime.visit.steps import LOAD, SELFTEST


def test_cell(bundle: Bundle, tried: Mapping[str, Any]) -> None:
    """The bundle loads and gives the float model's answers; a failure says what is known about the cell."""
    load = tried[LOAD]
    if not load["loads"]:
        pytest.fail("\n".join([load["says"], *load["log"], _known(bundle)]), pytrace=False)
    found = tried[SELFTEST]
    if not found["result"]:
        pytest.skip(found["says"])
    if not found["right"]:
        pytest.fail(f"{found['result']}: {found['says']}\n{_known(bundle)}", pytrace=False)


@pytest.mark.usefixtures("bundle")
def test_probe(tried: Mapping[str, Any], probe: str) -> None:
    """The library does nothing that makes answers worse; an undecided question is skipped."""
    found = tried.get(probe)
    if found is None:
        pytest.skip("it was not loaded")
    if found["result"] in ("", UNDECIDED):
        pytest.skip(found["says"])
    if is_harmful(probe, found["result"]):
        pytest.fail(f"{QUESTIONS[probe].text} {found['result']}: {found['says']}", pytrace=False)


def _known(bundle: Bundle) -> str:
    try:
        return known(case_of(bundle), cell_of(bundle))
    except RKEdgeError:
        return ""
