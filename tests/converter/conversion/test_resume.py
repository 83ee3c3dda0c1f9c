"""What is kept of a run that was killed is of the very same work: otherwise the next run begins anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rkconvert import demo
from rkconvert.adapters.merged_model import AdapterSource
from rkconvert.output.hf_folder import forget_shards, write_weights
from rkconvert.sources.checkpoint import open_checkpoint
from rkruntime.cli import main

SCRIPT = Path(__file__).with_name("changed_between.py")


def trials(folder, seed, count):
    command = [sys.executable, str(SCRIPT), str(folder), str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count
    for row in rows:
        assert not row["differ"], row
    # A test of what begins anew says nothing where nothing is ever kept.
    assert any(row["change"] == "nothing" and row["steps"][0] < row["steps"][1] for row in rows)
    return rows


def test_something_changed_between_a_kill_and_the_next_run(tmp_path):
    rows = trials(tmp_path, 9, 13)
    assert len({row["change"] for row in rows}) == 13


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_many_changes(tmp_path):
    trials(tmp_path, int.from_bytes(os.urandom(4), "little"), 130)


@pytest.mark.parametrize("state", ["[]", "null", "7", '{"model.safetensors": []}', "[" * 100_000, "\x00\xff", ""])
def test_a_damaged_list_of_finished_shards_begins_anew(tmp_path, state):
    weights = open_checkpoint(demo.checkpoint()).weights
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        if name == "resumed":
            (tmp_path / name / "shards.json").write_bytes(state.encode("latin-1"))
            (tmp_path / name / "model.safetensors").write_bytes(b"half")
        write_weights(tmp_path / name, weights, lambda done: None)
        forget_shards(tmp_path / name)
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["model.safetensors"]
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert first.read_bytes() == second.read_bytes()


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("change", ["nothing", "touched", "alpha", "weights", "template", "tokenizer", "weight"])
def test_a_matrix_keeps_what_it_would_make_again(tmp_path, capsys, change):
    for name, source in (("base", demo.checkpoint()), ("lora", demo.adapter())):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "out").mkdir()

    def run(weight="0.1234567"):
        recipe = {"checkpoint": "base", "output": "out", "matrix": {"lora": [[f"lora={weight}"]]}}
        (tmp_path / "m.yaml").write_text(json.dumps(recipe))
        code = main(["convert", "--matrix", str(tmp_path / "m.yaml"), "-q", "--json"])
        return code, json.loads(capsys.readouterr().out)[0]

    assert run()[1]["status"] == "made"
    weight = "0.1234567"
    if change == "touched":
        os.utime(tmp_path / "base" / "config.json")
        os.utime(next((tmp_path / "base").glob("*.safetensors")))
    elif change == "alpha":
        edit(tmp_path / "lora" / "adapter_config.json", lora_alpha=77)
    elif change == "weights":
        file = next((tmp_path / "lora").glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-4] ^= 1
        file.write_bytes(data)
    elif change == "template":
        (tmp_path / "base" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    elif change == "tokenizer":
        edit(tmp_path / "base" / "tokenizer.json", own=1)
    elif change == "weight":  # equal in six digits
        weight = "0.12345671"
    code, outcome = run(weight)
    if change in ("nothing", "touched"):
        assert (code, outcome["status"]) == (0, "there")
    else:
        assert (code, outcome["status"]) == (3, "failed")
        assert "made from something else" in outcome["message"]


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=0.5").mkdir()
    assert AdapterSource.parse("a=0.5") == AdapterSource("a=0.5")
    assert AdapterSource.parse("b=0.5") == AdapterSource("b", 0.5)
    assert AdapterSource.parse("a=0.5=2") == AdapterSource("a=0.5", 2.0)
