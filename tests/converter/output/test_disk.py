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
from rkconvert.commands import merge
from rkconvert.emulated import target
from rkconvert.output import bundle_folder, hf_folder
from rkconvert.output.disk import room_for, spare
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


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Where each command writes what is long work, and what it writes afterwards.
WORK = {"convert": (target, "write_emulator_file"), "merge": (hf_folder, "_write_shard")}
AFTERWARDS = {
    "convert": [
        (bundle_folder, "write_side_files"),
        (bundle_folder, "write_report"),
        (bundle_folder, "write_manifest"),
    ],
    "merge": [(merge, "write_json"), (merge, "copy_side_files")],
}


@pytest.mark.parametrize(("command", "then"), [(name, item) for name, items in AFTERWARDS.items() for item in items])
def test_finished_work_survives_a_disk_that_fills_up_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str, then: tuple[Any, str]
) -> None:
    line = [command, str(demo.checkpoint()), "--lora", str(demo.adapter()), "-q", "-o"]
    assert main([*line, str(tmp_path / "plain")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(*then, full)
        assert main([*line, str(tmp_path / "made")]) == 5
    assert "what took long is kept in" in capsys.readouterr().err
    monkeypatch.setattr(*WORK[command], lambda *_: pytest.fail("it is done again"))
    assert main([*line, str(tmp_path / "made")]) == 0
    plain, made = (
        {
            path.name: path.read_bytes()
            for path in (tmp_path / name).iterdir()
            if path.suffix in (".rkemu", ".safetensors")
        }
        for name in ("plain", "made")
    )
    assert made == plain
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "plain"]
    names = [
        {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")} for name in ("plain", "made")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("change", ["boot", "touched", "gone"])
def test_a_file_that_may_be_another_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    line = ["convert", str(demo.checkpoint()), "-q", "-o", str(tmp_path / "made")]
    with monkeypatch.context() as patch:
        patch.setattr(bundle_folder, "write_manifest", full)
        assert main(line) == 5
    file = tmp_path / ".made.partial" / "model.rkemu"
    if change == "boot":
        monkeypatch.setattr(target, "boot_id", lambda: "another")
    elif change == "touched":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    assert main(line) == 0
    assert main(["inspect", str(tmp_path / "made"), "--verify"]) == 0
    assert main([*line[:-1], str(tmp_path / "plain")]) == 0
    assert (tmp_path / "made" / "model.rkemu").read_bytes() == (tmp_path / "plain" / "model.rkemu").read_bytes()


def test_room_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "report.json"
    with pytest.raises(ValueError, match="it failed"), room_for(path, 10_000):
        assert not path.exists()
        (room,) = path.parent.iterdir()
        assert room.stat().st_blocks * 512 >= 10_000
        raise ValueError("it failed")
    assert list(path.parent.iterdir()) == []
    with room_for(path, 10_000) as put:
        put(b"{}")
        assert path.read_bytes() == b"{}"
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostError, match="disk is full"), room_for(tmp_path / "other", 1):
        pytest.fail("the work began")
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]
