"""Room for the small files: held while the large one is made, and there when they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from tests.converter.held_room import ROOM, held

from rkconvert import demo
from rkconvert.calibrate.build import Builder
from rkconvert.emulated import target
from rkconvert.output import bundle_folder
from rkconvert.output.disk import spare
from rkruntime.cli import main
from rkruntime.errors import HostError, OutputError


def test_it_is_held_without_a_name(tmp_path: Path) -> None:
    before = held()
    with spare(tmp_path):
        assert held() - before >= ROOM
        assert list(tmp_path.iterdir()) == []
    assert held() == before


def test_a_disk_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostError, match="disk is full"), spare(tmp_path):
        pytest.fail("the work began")
    assert list(tmp_path.iterdir()) == []
    line = ["calibrate", str(demo.checkpoint()), "-o", str(tmp_path / "data.json")]
    monkeypatch.setattr(Builder, "build", lambda *_: pytest.fail("answers are computed"))
    assert main(line) == 5
    with pytest.raises(OutputError), spare(tmp_path / "none"):
        pytest.fail("the work began")


def test_it_is_free_when_reports_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = held(), []

    def look(name: str, real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            seen.append((name, held() - before >= ROOM))
            return real(*args, **more)

        return call

    monkeypatch.setattr(target, "write_emulator_file", look("model", target.write_emulator_file))
    monkeypatch.setattr(bundle_folder, "write_report", look("report", bundle_folder.write_report))
    assert main(["convert", str(demo.checkpoint()), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert dict(seen) == {"model": True, "report": False}
