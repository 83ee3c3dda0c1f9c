"""What hostile.py makes and what came of it: refused in its own words, nothing run, nothing left, little memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.converter.conversion.hostile import CASES

MIB = 256


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases in one process without torch, so that memory is theirs."""
    command = [sys.executable, "-m", "tests.converter.conversion.hostile", str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    found = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"{done.stderr}\nafter {list(found)[-1:]}"
    return found


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_does_nothing(outcomes, name):
    row = outcomes[name]
    said = row["said"]
    # 2 the recipe or the command line, 3 a file; 1 would be a defect of ours, -1 that it hung.
    assert row["code"] in (2, 3), said
    assert re.search(row["words"], said), said
    assert re.fullmatch(r"error: .+\nhint:  .+\n", said), said
    assert not row["executed"]
    assert row["left"] == []
    assert row["mib"] < MIB


def test_every_message_is_its_own(outcomes):
    messages = [re.sub(r"\.\.\./\S*/", "", row["said"].splitlines()[0]) for row in outcomes.values()]
    assert len(set(messages)) == len(CASES)
