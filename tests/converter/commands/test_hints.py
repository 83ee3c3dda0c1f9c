"""What a newcomer names by mistake: each error says what to name instead."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rkconvert import demo
from rkruntime.cli import main
from rkruntime.files import path_hint


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, an adapter `a`, a folder `outer` with both, a folder `g` with a GGUF, and what is none of these."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(demo.checkpoint(), desk / "m")
    shutil.copytree(demo.adapter(), desk / "a")
    shutil.copytree(demo.checkpoint(), desk / "outer" / "inner-model")
    shutil.copytree(demo.adapter(), desk / "outer" / "inner-adapter")
    (desk / "g").mkdir()
    for name in ("x-00002-of-00002.gguf", "y-00001-of-00002.gguf"):
        (desk / "g" / name).touch()
    (desk / "empty").mkdir()
    (desk / "notes.txt").write_text("notes")
    return desk


CASES = {
    "convert notes.txt": "Name a folder in Hugging Face layout, a .gguf file",
    "convert m/config.json": "Name the folder that it is in: m",
    "convert m/model-00001-of-00003.safetensors": "Name the folder that it is in: m",
    "convert m/model.safetensors": "Check the spelling",
    "convert missing.gguf": "Check the spelling",
    "convert empty/missing.gguf": "Check the spelling",
    "convert outer": "Name the model inside it: outer/inner-model",
    "convert g": "Name the model inside it: g/y-00001-of-00002.gguf",
    "convert a": "Use its base model, with --lora a",
    "convert m --lora a/adapter_model.safetensors": "Name the folder that it is in: a",
    "convert m --lora outer": "Name the folder inside it: outer/inner-adapter",
    "convert m --lora m": "It is a model",
    "convert m --lora missing": "Check the spelling",
    "convert m -o notes.txt/x": "Name a folder",
    "convert m -o missing/x": "mkdir -p missing",
    "plan a": "Use its base model",
    "plan m/tokenizer.json": "Name the folder that it is in: m",
    "plan notes.txt": "Name a folder with config.json",
    "plan outer": "Name the model inside it: outer/inner-model",
    "plan m --html empty": "is a directory",
    "plan m --html missing/page.html": "mkdir -p missing",
    "calibrate m --text empty -o q.json": "name a file in it",
    "calibrate m --chats missing -o q.json": "Check the spelling",
    "toolkit setup --wheel empty": "name a file in it",
}


@pytest.mark.parametrize("line", CASES)
def test_the_hint_names_what_to_do(
    desk: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    assert main(line.split()) in (2, 3)
    assert CASES[line] in capsys.readouterr().err
    assert sorted(desk.rglob("*")) == before


@pytest.mark.parametrize("line", ["convert m", "convert m --lora a", "plan m"])
@pytest.mark.parametrize("kept", [".safetensors", "config.json", "tokenizer.json", "adapter_config.json"])
def test_a_file_that_may_not_be_read(
    desk: Path, line: str, kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the system says it, to somebody else than root."""
    monkeypatch.chdir(desk)
    met: list[str] = []

    def refuse(name: Any) -> None:
        if isinstance(name, str | Path) and str(name).startswith(("m/", "a/")) and str(name).endswith(kept):
            met.append(str(name))
            raise PermissionError(13, "Permission denied", str(name))

    opened, opened_path, opened_low = open, Path.open, os.open
    monkeypatch.setattr("builtins.open", lambda name, *more, **k: refuse(name) or opened(name, *more, **k))
    monkeypatch.setattr(Path, "open", lambda self, *more, **k: refuse(self) or opened_path(self, *more, **k))
    monkeypatch.setattr(os, "open", lambda name, *more, **k: refuse(name) or opened_low(name, *more, **k))
    code = main([*line.split(), *(["-o", str(desk / "made")] if "convert" in line else [])])
    said = capsys.readouterr().err
    shutil.rmtree(desk / "made", ignore_errors=True)
    if not met:
        assert code == 0
        return
    assert code == 3
    assert f"{met[0]} cannot be read: Permission denied" in said
    assert f"namei -l {met[0]}" in said


def test_an_error_of_the_disk_has_no_hint_about_the_path() -> None:
    assert path_hint(OSError(5, "Input/output error"), "x") is None
