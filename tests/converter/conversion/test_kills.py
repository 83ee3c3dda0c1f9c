"""A kill before any step on the disk leaves no bundle or a whole one, and the second run finishes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_points.py")


def killed(command, folder, step):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), command, str(folder), str(step)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row["status"] == -9, row
        assert row["whole"], row
        assert row["finished"], row
    return rows


@pytest.mark.parametrize(("command", "step"), [("convert", 37), ("merge", 13), ("matrix", 61)])
def test_some_steps(tmp_path, command, step):
    assert killed(command, tmp_path, step)[0]["bundles"] == 0


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", ["convert", "merge", "matrix"])
def test_every_step(tmp_path, command):
    rows = killed(command, tmp_path, 1)
    assert len(rows) == rows[0]["of"] > 20
