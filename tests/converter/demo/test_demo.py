"""The committed demo model: what it answers, how it is laid out, and that its sliding window matters."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rkconvert.demo import adapter, checkpoint, questions
from rkconvert.demo.w8a8 import simulated

WINDOW = 32
QUESTIONS = questions()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(checkpoint())


def load(**settings: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint(), dtype=torch.float32, attn_implementation="eager", **settings
    ).eval()


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return load()


@pytest.fixture(scope="module")
def pirate() -> Iterator[torch.nn.Module]:
    return PeftModel.from_pretrained(load(), adapter()).eval()


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> torch.Tensor:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Greedy answers in batches of equal prompt length, which need no padding on the left."""
    by_length: dict[int, list[int]] = {}
    prompts = [prompt_ids(tokenizer, q.question) for q in QUESTIONS]
    for index, ids in enumerate(prompts):
        by_length.setdefault(ids.shape[1], []).append(index)
    texts = [""] * len(QUESTIONS)
    for length, indices in by_length.items():
        ids = torch.cat([prompts[index] for index in indices])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)
        for index, row in zip(indices, out[:, length:], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True)
            assert 107 in row.tolist(), f"{texts[index]!r} did not end with <end_of_turn>"
    return texts


def test_base_answers_exactly(base, tokenizer):
    assert answers(base, tokenizer) == [q.answer for q in QUESTIONS]


def test_pirate_answers_exactly(pirate, tokenizer):
    assert answers(pirate, tokenizer) == [q.pirate for q in QUESTIONS]
    with pirate.disable_adapter():
        assert answers(pirate, tokenizer) == [q.answer for q in QUESTIONS]


@pytest.mark.parametrize("attribute", ["answer", "pirate"])
def test_answers_survive_w8a8(tokenizer, attribute):
    model = load()
    if attribute == "pirate":
        model = PeftModel.from_pretrained(model, adapter()).merge_and_unload().bfloat16().float()
    with simulated(model):
        assert answers(model, tokenizer) == [getattr(q, attribute) for q in QUESTIONS]


def test_layout_of_the_checkpoint():
    index = json.loads((checkpoint() / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) >= 2
    assert all((checkpoint() / name).is_file() for name in shards)
    generation = json.loads((checkpoint() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 107]
    assert "/" not in json.loads((adapter() / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert sum(path.stat().st_size for root in (checkpoint(), adapter()) for path in root.iterdir()) < 4_000_000


def test_template_is_the_same_in_both_places():
    config = json.loads((checkpoint() / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (checkpoint() / "chat_template.jinja").read_text()


def test_tokenizer_round_trips(tokenizer):
    for question in QUESTIONS:
        for text in (question.question, question.answer, question.pirate, "naïve 漢字 🏴‍☠️\n\n  x"):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]) == [
        0, 1, 2, 106, 107,
    ]  # fmt: skip
    assert tokenizer("Hello!").input_ids[0] == 2


def test_an_emoji_is_several_byte_tokens(tokenizer):
    with_emoji = [q.answer for q in QUESTIONS if not q.answer.isascii()]
    assert 1 <= len(with_emoji) <= 2
    for text in with_emoji:
        tokens = tokenizer.tokenize(text)
        assert sum(token.startswith("<0x") for token in tokens) >= 4


def test_the_window_matters(base, tokenizer):
    ids = max((prompt_ids(tokenizer, q.question) for q in QUESTIONS), key=lambda ids: ids.shape[1])
    assert base.config.sliding_window == WINDOW < ids.shape[1]
    wide = load(sliding_window=base.config.max_position_embeddings)
    with torch.no_grad():
        narrow_logits, wide_logits = base(ids).logits[0], wide(ids).logits[0]
    torch.testing.assert_close(narrow_logits[:WINDOW], wide_logits[:WINDOW])
    assert (narrow_logits[WINDOW:] - wide_logits[WINDOW:]).abs().amax() > 0.5


def test_far_names_are_told_apart(base, tokenizer):
    """Two prompts that differ in a token which the window has left by the end."""
    first, second = (prompt_ids(tokenizer, q.question)[0] for q in QUESTIONS if "called" in q.question)
    (position,) = (first != second).nonzero().flatten().tolist()
    assert len(first) - position > WINDOW
