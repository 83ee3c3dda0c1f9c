"""From texts to an answer that only the fine-tune gives, by the commands of docs/finetune.md."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rkconvert import demo
from rkconvert.model.chat_template import read_template
from rkruntime.engine.open import SamplingOptions
from rkruntime.model import open_model
from rkruntime.text.template import GEMMA, Message, load_template
from rkruntime.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[3] / "configs" / "finetune"
CHECKPOINT = Path(demo.__file__).parent / "checkpoint"
SCRIPT = runpy.run_path(str(FOLDER / "train_lora.py"))
# One thread: torch's own ones wait for each other, which takes minutes on a busy machine.
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def chat_line(question: object, answer: object) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


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
        ('{"messages": [{"role": "system", "content": "a"}]}', "must alternate"),
        (chat_line([{"type": "text", "text": "a"}], "b"), "must be a text"),
        (chat_line("a", None), "must be a text"),
        (chat_line("a", "half").replace("half", r"\ud800"), "line 1: expected"),
        ("\udcff", "cannot be read"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "data.jsonl").write_text(f"{line}\n", errors="surrogateescape")
    with pytest.raises(SystemExit, match=said):
        SCRIPT["conversations"](tmp_path / "data.jsonl")


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_only_line_feeds_end_a_line(tmp_path: Path, start: str, end: str) -> None:
    said = "a\u2028b\x85c\x0bd\x1ce"
    (tmp_path / "data.jsonl").write_bytes((start + 2 * (chat_line(said, said) + end)).encode())
    found = SCRIPT["conversations"](tmp_path / "data.jsonl")
    assert [[message["content"] for message in messages] for messages in found] == 2 * [[said, said]]


def tokenizer_with(folder: Path, template: str | None) -> Any:
    """The demo's tokenizer in a folder with another chat template, or none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(CHECKPOINT / name, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({key: settings[key] for key in settings if settings[key]}))
    return AutoTokenizer.from_pretrained(folder)


TURNS = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
)
ASKS = "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
TEMPLATES = {
    "none": None,
    "Gemma": GEMMA,
    "a system role": "{{ bos_token }}" + TURNS + ASKS,
    "no <bos>": TURNS + ASKS,
    "white space before <bos>": "\n {{ bos_token }}" + TURNS + ASKS,
    "a system message that is dropped": "{{ bos_token }}"
    + TURNS.replace("messages", "messages if m.role != 'system'")
    + ASKS,
    "a space before each answer": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST] ' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "earlier thoughts dropped": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' }}{% if loop.last %}{{ m.content }}"
        "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}" + ASKS
    ),
}  # fmt: skip


def board_prompt(folder: Path, messages: list[Message]) -> list[int]:
    """Token ids that RKEdge gives to a board for a conversation on this checkpoint."""
    template = read_template(folder, "<bos>")
    tokenizer = Tokenizer.parse((folder / "tokenizer.json").read_bytes(), folder / "tokenizer.json")
    loaded = load_template(template.source, template.system_role, template.special_tokens, tokenizer)
    return tokenizer.assemble(loaded.parts(messages))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("seed", range(3))
def test_each_answer_is_learnt_after_the_prompt_of_a_board(tmp_path: Path, template: str, seed: int) -> None:
    rng = random.Random(seed)
    chat = SCRIPT["Chat"](tokenizer := tokenizer_with(tmp_path, TEMPLATES[template]))
    words = ["the key", "On", "blue  box.", "é", "日本", "1\n2", "<b>"]
    said = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2 * rng.randint(1, 3))]
    said[1] = f"<think>why</think>{said[1]}"
    messages = [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(said)]
    if seed:
        messages.insert(0, {"role": "system", "content": "Say it."})
    history, learnt = [], 0
    rows = chat.rows(messages)
    for row in rows:
        spans = [label != SCRIPT["IGNORED"] for label in row["labels"]]
        starts = [at for at, on in enumerate(spans) if on and not spans[at - 1]]
        for start in starts:
            end = next((at for at in range(start, len(spans)) if not spans[at]), len(spans))
            upto = [index for index, message in enumerate(messages) if message["role"] == "assistant"][learnt]
            ids, answer = row["input_ids"][start:end], messages[upto]["content"]
            assert row["labels"][start:end] == ids
            assert tokenizer.decode(ids[:-1]) == answer
            assert tokenizer.decode(ids[-1:]) in ("<end_of_turn>", "<eos>")
            history += [Message(**message) for message in messages[len(history) : upto]]
            assert row["input_ids"][:start] == board_prompt(tmp_path, history)
            history.append(Message("assistant", answer, tuple(ids[:-1])))
            learnt += 1
    assert learnt == len(said) // 2
    assert len(rows) == 1 or template == "earlier thoughts dropped"


@pytest.mark.parametrize(
    ("template", "question", "said"),
    [
        (GEMMA, "a<end_of_turn>b", "A question has the control token <end_of_turn>"),
        (TURNS + ASKS.replace("assistant", "assistant\\n<think>"), "a", r"ends prompts with .*<think>"),
        (TURNS.replace("<end_of_turn>", "") + ASKS, "a", "does not end an answer with a control token"),
    ],
)
def test_what_cannot_be_learnt_as_a_board_asks(tmp_path: Path, template: str, question: str, said: str) -> None:
    chat = SCRIPT["Chat"](tokenizer_with(tmp_path, template))
    with pytest.raises(SystemExit, match=said):
        chat.rows([{"role": "user", "content": question}, {"role": "assistant", "content": "b"}])


@pytest.mark.parametrize(("there", "said"), [("a file", "cannot be written"), ("a full folder", "exists already")])
def test_an_output_that_is_there_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, said: str
) -> None:
    output = tmp_path / "adapter"
    output.write_text("mine") if there == "a file" else (output / "mine").mkdir(parents=True)
    line = ["train_lora.py", CHECKPOINT, FOLDER / "example.jsonl", "-o", output]
    monkeypatch.setattr(sys, "argv", [*map(str, line)])
    with pytest.raises(SystemExit, match=said):
        SCRIPT["main"]()
