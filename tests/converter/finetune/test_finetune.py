"""From texts to an answer that only the fine-tune gives, by the commands of docs/finetune.md."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rkconvert import demo
from rkruntime.engine.open import SamplingOptions
from rkruntime.model import open_model

FOLDER = Path(__file__).parents[3] / "configs" / "finetune"
CHECKPOINT = Path(demo.__file__).parent / "checkpoint"
# One thread: torch's own ones wait for each other, which takes minutes on a busy machine.
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "train_lora.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ALONE, check=False)


def learns(tmp_path: Path, *options: str) -> None:
    data, adapter, bundle = FOLDER / "example.jsonl", tmp_path / "adapter", tmp_path / "bundle"
    done = train(CHECKPOINT, data, "-o", adapter, "--epochs", 40, "--rate", 5e-3, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Next: rkedge convert {CHECKPOINT} --lora {adapter}"
    convert = [sys.executable, "-m", "rkruntime.cli", "convert", str(CHECKPOINT), "--lora", str(adapter)]
    subprocess.run([*convert, "-o", str(bundle), "--quiet"], env=ALONE, check=True)
    with open_model(bundle, sampling=SamplingOptions(temperature=0)) as model:
        for line in data.read_text().splitlines():
            asked, answer = json.loads(line)["messages"][:2]
            assert model.ask(asked["content"]).text == answer["content"]
        assert model.ask("What is the RK3588?").text


def test_from_texts_to_an_answer(tmp_path: Path) -> None:
    learns(tmp_path)


@pytest.mark.long
def test_from_texts_to_an_answer_in_4_bits(tmp_path: Path) -> None:
    learns(tmp_path, "--nf4")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "has no conversation"),
        ("{", "line 1: expected"),
        ('{"messages": 5}', "line 1: expected"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: user and assistant must alternate"),
        ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}', "must alternate"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "data.jsonl").write_text(f"{line}\n")
    script = runpy.run_path(str(FOLDER / "train_lora.py"))
    with pytest.raises(SystemExit, match=said):
        script["conversations"](tmp_path / "data.jsonl")
