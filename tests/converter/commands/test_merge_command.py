"""`rkedge merge`: what it writes is what transformers loads, and a run that was broken off is taken up again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.output import hf_folder
from rkconvert.output.hf_folder import plan_shards, resumable, write_weights
from rkconvert.output.work_folder import work_folder
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.tensors.weights import TensorInfo
from rkruntime.cli import main
from rkruntime.errors import HostError, OutputError, UsageError


def test_transformers_loads_it_and_finds_pefts_weights(make_model, make_adapter, peft_merge, tmp_path, capsys):
    base = make_model()
    adapter = make_adapter(base)
    output = tmp_path / "merged"
    assert main(["merge", str(base), "--lora", str(adapter), "-o", str(output), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 35
    theirs = peft_merge(base, {adapter: 1.0})
    mine = AutoModelForCausalLM.from_pretrained(output)
    assert mine.dtype == torch.bfloat16
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<bos><start_of_turn>user\nx<end_of_turn>\n"


def test_settings_follow_the_adapter(make_model, make_adapter, peft_merge, tmp_path):
    base = make_model()
    adapter = make_adapter(
        base,
        prepare=lambda model: model.resize_token_embeddings(1040, mean_resizing=False),
        modules_to_save=["embed_tokens"],
    )
    assert main(["merge", str(base), "--lora", str(adapter), "-o", str(tmp_path / "merged"), "--quiet"]) == 0
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (mine.config.vocab_size, mine.config.tie_word_embeddings) == (1040, False)
    theirs = peft_merge(base, {adapter: 1.0}, 1040)
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_weights_of_adapters(make_model, make_adapter, peft_merge, tmp_path):
    base = make_model()
    adapter = make_adapter(base, "name=with=equals")
    output = tmp_path / "merged"
    assert main(["merge", str(base), "--lora", f"{adapter}=0.25", "-o", str(output), "--quiet"]) == 0
    theirs, mine = peft_merge(base, {adapter: 0.25}), AutoModelForCausalLM.from_pretrained(output)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.state_dict().items())
    assert AdapterSource.parse(str(adapter)) == AdapterSource(str(adapter))
    with pytest.raises(UsageError, match="not a number"):
        AdapterSource.parse("folder=half")


class Counting:
    """Weights that count what is read of them, and break off when they are told to."""

    def __init__(self, weights, stop_at=None):
        self._weights, self.tensors, self.reads, self._stop_at = weights, weights.tensors, [], stop_at

    def read(self, name, first, count):
        self.reads.append(name)
        if name == self._stop_at:
            raise KeyboardInterrupt
        return self._weights.read(name, first, count)


LIMIT = 40_000


def test_finished_shards_are_kept_and_verified(make_model, make_adapter, tmp_path):
    base = make_model()
    model = merged_model(open_checkpoint(base), [AdapterSource(str(make_adapter(base)))])
    plans = plan_shards(model.weights.tensors, LIMIT)
    assert len(plans) > 5
    whole, output = tmp_path / "whole", tmp_path / "out"
    with work_folder(whole, "job") as folder:
        write_weights(folder, model.weights, lambda _: None, LIMIT)
    stopped_in = next(iter(plans[4].tensors))
    with pytest.raises(KeyboardInterrupt), work_folder(output, "job") as folder:
        write_weights(folder, Counting(model.weights, stopped_in), lambda _: None, LIMIT)
    assert not output.exists()
    kept = tmp_path / ".out.partial"
    damaged = kept / plans[1].name
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    again, done = Counting(model.weights), []
    with work_folder(output, "job", resumable(model.weights, LIMIT)) as folder:
        write_weights(folder, again, done.append, LIMIT)
    expected = [name for at, plan in enumerate(plans) for name in plan.tensors if at not in (0, 2, 3)]
    assert list(dict.fromkeys(again.reads)) == expected
    assert sum(done) == sum(plan.nbytes for plan in plans)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("full_at", range(2, 6))
def test_a_disk_that_fills_up_keeps_the_finished_shards(
    make_model, make_adapter, tmp_path, monkeypatch, capsys, full_at
):
    base = make_model()
    line = ["merge", str(base), "--lora", str(make_adapter(base)), "-q", "-o"]
    monkeypatch.setattr(write_weights, "__defaults__", (LIMIT,))
    monkeypatch.setattr(resumable, "__defaults__", (LIMIT,))
    assert main([*line, str(tmp_path / "whole")]) == 0
    real, begun = hf_folder._write, set()

    def write(file, data):
        begun.add(file.name)
        if len(begun) == full_at:
            real(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(hf_folder, "_write", write)
        assert main([*line, str(tmp_path / "out")]) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "disk is full" in said
    assert "kept in" in said
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert len(left) == full_at - 1
    assert not list((tmp_path / ".out.partial").glob("*.partial"))
    assert main([*line, str(tmp_path / "out")]) == 0
    assert all((tmp_path / "out" / path.name).stat().st_mtime_ns == time for path, time in left.items())
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert one == other
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_another_job_begins_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "out", "first") as folder:
        (folder / "left").touch()
        raise KeyboardInterrupt
    assert (tmp_path / ".out.partial" / "left").exists()
    with work_folder(tmp_path / "out", "second") as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


HOLD = """
import sys
from pathlib import Path
from rkconvert.output.work_folder import work_folder
with work_folder(Path(sys.argv[1]), "job"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_two_runs_at_once(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(OutputError, match="Another run is writing"), work_folder(tmp_path / "out", "job"):
            pass
        other.communicate()
    assert (tmp_path / "out").is_dir()


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path / "out", "job") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HostError, match="disk is full"), work_folder(tmp_path / "out", "job"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_shards_are_read_by_safetensors(make_model, tmp_path):
    from safetensors import safe_open

    checkpoint = open_checkpoint(make_model())
    with work_folder(tmp_path / "out", "job") as folder:
        write_weights(folder, checkpoint.weights, lambda _: None, LIMIT)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.nbytes
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            theirs = opened.get_tensor(name).view(torch.int16).numpy().view(np.uint16)
            assert opened.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(theirs, checkpoint.weights.read(name, 0, theirs.shape[0]))


def test_shards_hold_what_they_may():
    tensors = {f"t{at}": TensorInfo("F32", (10, 10)) for at in range(7)}
    assert [len(plan.tensors) for plan in plan_shards(tensors, 900)] == [2, 2, 2, 1]
    assert [len(plan.tensors) for plan in plan_shards(tensors, 100)] == [1] * 7
    assert [plan.name for plan in plan_shards(tensors, 10_000)] == ["model.safetensors"]
