"""A source that changes while it is read."""

from __future__ import annotations

import os
import random
import shutil
from itertools import count

import pytest
from tests.converter.sources.other_formats import TYPES, as_bin, quantize, write_gguf

from rkconvert import demo
from rkconvert.output import hf_folder
from rkruntime.bundle import rkemu
from rkruntime.cli import main


def overwritten(path):
    """Other bytes, with size and time of change as they were."""
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"0123456789")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced(path):
    shutil.copy2(path, path.with_name("other"))
    path.with_name("other").replace(path)


def away_and_back(path):
    path.rename(path.with_name("other"))
    path.with_name("other").rename(path)


CHANGES = {
    "overwritten": overwritten,
    "replaced": replaced,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "touched": lambda path: path.touch(),
    "away and back": away_and_back,
    "gone": lambda path: path.unlink(),
    "new": lambda path: path.write_text("{}"),
}


def change_at(monkeypatch, moment, path, change):
    """Change a file when the `moment`th block of a result is written."""
    calls = count(1)

    def announced(real):
        def write(*arguments):
            if next(calls) == moment:
                CHANGES[change](path)
            return real(*arguments)

        return write

    for owner, name in ((hf_folder, "_write"), (rkemu.Writer, "write_rows")):
        monkeypatch.setattr(owner, name, announced(getattr(owner, name)))


@pytest.mark.parametrize(
    ("command", "kind", "file", "change"),
    [
        *[("merge", "folder", "model-00002-of-00003.safetensors", change) for change in CHANGES if change != "new"],
        ("convert", "folder", "model-00003-of-00003.safetensors", "overwritten"),
        ("convert", "folder", "model-00003-of-00003.safetensors", "replaced"),
        ("convert", "folder", "config.json", "longer"),
        ("convert", "folder", "tokenizer.json", "replaced"),
        ("convert", "folder", "generation_config.json", "gone"),
        ("merge", "folder", "added_tokens.json", "new"),
        ("merge", "folder", "../lora/adapter_model.safetensors", "overwritten"),
        ("convert", "folder", "../lora/adapter_config.json", "touched"),
        ("merge", "bin", "pytorch_model-0.bin", "overwritten"),
        ("convert", "gguf", "model.gguf", "overwritten"),
        ("convert", "gguf", "model.gguf", "replaced"),
        ("convert", "nf4", "model.safetensors", "overwritten"),
        ("merge", "nf4", "model.safetensors", "cut"),
    ],
)
def test_a_source_that_changes_while_it_is_read(
    make_model, make_adapter, tmp_path, monkeypatch, capsys, command, kind, file, change
):
    if kind in ("nf4", "bin"):
        base = make_model(intermediate_size=128)
        lora = make_adapter(base)
        quantize(base, "nf4") if kind == "nf4" else as_bin(base, 1)
    else:
        base = shutil.copytree(demo.checkpoint(), tmp_path / "base")
        lora = shutil.copytree(demo.adapter(), tmp_path / "lora")
    path = (base / file).absolute()
    if kind == "gguf":
        base = path = tmp_path / file
        write_gguf(path, demo.checkpoint(), TYPES.F16)
    (tmp_path / "out").mkdir()
    change_at(monkeypatch, random.randint(1, 20), path, change)
    assert main([command, str(base), "--lora", str(lora), "-o", str(tmp_path / "out" / "made"), "-q"]) == 3
    said = capsys.readouterr().err
    # Which of the three depends on the moment.
    others = {"cut": "was truncated while it was read", "gone": f"{path.resolve()} cannot be read"}
    assert f"{path.resolve()} changed while it was read" in said or others.get(change, " changed ") in said
    assert list((tmp_path / "out").iterdir()) == []
