"""What a bundle's self-test expects, against transformers' own greedy answers, and against W8A8 simulated in torch."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkconvert.adapters.merged_model import AdapterSource
from rkconvert.conversion import expected
from rkconvert.conversion.convert import Options, convert
from rkconvert.conversion.rounding import rounded
from rkconvert.demo import checkpoint, w8a8
from rkconvert.model.float_model import FloatModel
from rkruntime import cli
from rkruntime.bundle.manifest import Bundle
from rkruntime.bundle.selftest import SelfTest
from rkruntime.errors import CheckpointError

Make = Callable[..., Path]


def made(folder: Path, output: Path, **options: Any) -> Bundle:
    return convert(Options(checkpoint=str(folder), output=output, **options))


def test_of(bundle: Bundle) -> SelfTest:
    bundle.verify(trust_stamps=False)
    found = bundle.read_selftest()
    assert found is not None
    return found


test_of.__test__ = False  # type: ignore[attr-defined]


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        rows: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    return rows


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def compare(found: SelfTest, model: Any, tokenizer: Any, ends: set[int], most: int = 12) -> None:
    """Hold each number against transformers', which decodes greedily."""
    for prompt in found.prompts:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.question}], add_generation_prompt=True, return_dict=False
        )
        assert list(prompt.tokens) == list(asked)
        assert prompt.tokens.count(tokenizer.bos_token_id) == 1
        ids = list(asked)
        for step in prompt.answer:
            row = logits(model, ids)[-1]
            best = row.topk(5)
            np.testing.assert_allclose(step.behind, (best.values[0] - best.values).numpy(), atol=2e-3)
            np.testing.assert_allclose(row[list(step.ids)].numpy(), best.values.numpy(), atol=2e-3)
            ids.append(step.ids[0])
        answer = ids[len(asked) :]
        assert prompt.ends == (answer[-1] in ends)
        assert not ends & set(answer[:-1])
        assert prompt.ends or len(answer) <= most


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 3, "dtype": torch.float32, "tie_word_embeddings": False},
        {"seed": 4, "sliding_window": 8, "final_logit_softcapping": None},
        {"seed": 5, "family": "gemma"},
    ],
)
def test_random_models(make_model: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = make_model(**settings)
    found = test_of(made(folder, tmp_path / "bundle"))
    assert [len(prompt.answer) for prompt in found.prompts] == [12] * 3 or any(item.ends for item in found.prompts)
    compare(found, loaded(folder), AutoTokenizer.from_pretrained(folder), {1, 107})


def test_the_demo_model_plain_and_rounded(tmp_path: Path) -> None:
    found = test_of(made(checkpoint(), tmp_path / "bundle"))
    model = loaded(checkpoint())
    compare(found, model, AutoTokenizer.from_pretrained(checkpoint()), {1, 107})
    changes = []
    for prompt in found.prompts:
        ids, first = [*prompt.tokens, *prompt.ids], len(prompt.tokens) - 1
        plain = logits(model, ids)[first:-1]
        with w8a8.simulated(model):
            other = logits(model, ids)[first:-1]
        for step, mine, theirs in zip(prompt.answer, plain, other, strict=True):
            best = theirs.topk(2)
            assert step.rounded_margin == pytest.approx(float(best.values[0] - best.values[1]), abs=0.1)
            assert step.rounded_id == int(best.indices[0]) or step.rounded_margin < 0.1
            pair = [step.ids[0], *step.ids]
            changes.append(float(((mine[pair[0]] - mine[pair]) - (theirs[pair[0]] - theirs[pair])).abs().max()))
    assert found.rounding == pytest.approx(max(changes), rel=0.25)
    assert found.tolerance > max(changes)


def test_a_merged_and_a_separate_adapter_expect_the_same(
    make_model: Make, make_adapter: Make, peft_merge: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model(dtype=torch.float32)
    adapter = make_adapter(base, target_modules=["q_proj", "v_proj", "down_proj"])
    loras = (AdapterSource(str(adapter)),)
    merged = test_of(made(base, tmp_path / "merged", loras=loras))
    separate = test_of(made(base, tmp_path / "separate", loras=loras, lora_mode="runtime"))
    assert merged.prompts == separate.prompts
    model = loaded(base)
    model.load_state_dict(peft_merge(base, {adapter: 1}))
    compare(merged, model, AutoTokenizer.from_pretrained(base), {1, 107})


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_any_guess_in_few_passes_gives_a_beginning_of_the_same_answer(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    folder = make_model(vocab_size=1024)
    whole = test_of(made(folder, tmp_path / "whole"))
    chosen, words = random.Random(passes), [" the", "lazy", " 7", ",", "\n", " fox", "Paris"]
    guesses = {question: "".join(chosen.choices(words, k=9)) for question in expected._QUESTIONS}
    monkeypatch.setattr(expected, "_QUESTIONS", guesses)
    monkeypatch.setattr(expected, "_SMALL", 0)
    monkeypatch.setattr(expected, "_PASSES", passes)
    part = test_of(made(folder, tmp_path / "part", selftest=True))
    for long, short in zip(whole.prompts, part.prompts, strict=True):
        assert passes <= len(short.answer) <= 12
        assert long.ids[: len(short.ids)] == short.ids
        for one, other in zip(long.answer, short.answer, strict=False):
            assert one.behind == pytest.approx(other.behind, abs=2e-3)


def test_a_right_guess_takes_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "_QUESTIONS", {"Who made Gemma?": "Google DeepMind."})
    monkeypatch.setattr(expected, "_SMALL", 0)
    monkeypatch.setattr(expected, "_PASSES", 1)
    (prompt,) = test_of(made(checkpoint(), tmp_path / "bundle", selftest=True)).prompts
    assert prompt.ends
    assert AutoTokenizer.from_pretrained(checkpoint()).decode(prompt.ids[:-1]) == "Google DeepMind."


def test_a_large_model_for_the_emulator_has_one_only_if_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected, "_SMALL", 0)
    assert made(checkpoint(), tmp_path / "usual").read_selftest() is None
    assert made(checkpoint(), tmp_path / "wanted", selftest=True).read_selftest() is not None


def test_the_same_twice_and_none_if_not_wanted(tmp_path: Path) -> None:
    first, second = (made(checkpoint(), tmp_path / name) for name in ("first", "second"))
    assert (first.path / "report/selftest.json").read_bytes() == (second.path / "report/selftest.json").read_bytes()
    code = cli.main(["convert", str(checkpoint()), "--no-selftest", "-q", "-o", str(tmp_path / "without")])
    assert code == 0
    assert not (tmp_path / "without/report/selftest.json").exists()
    report = json.loads((tmp_path / "without/report/convert.json").read_text())
    assert report["made_of"]["options"]["selftest"] is False


def test_other_types_round_as_they_are(tmp_path: Path) -> None:
    grouped = test_of(made(checkpoint(), tmp_path / "grouped", dtype="w8a8_g128", force_dtype=True))
    whole = test_of(made(checkpoint(), tmp_path / "whole"))
    plain = test_of(made(checkpoint(), tmp_path / "plain", dtype="fp32"))
    assert plain.rounding == 0 < plain.tolerance
    assert [prompt.ids for prompt in plain.prompts] == [prompt.ids for prompt in grouped.prompts]
    assert 0 < grouped.rounding < 3 * whole.rounding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [8, 64])
def test_rounding_is_torch_s(bits: int, group: int) -> None:
    values = np.random.default_rng(bits).standard_normal((40, 64)).astype(np.float32)
    found = rounded(values, bits, group)
    theirs = torch.from_numpy(values).reshape(40, -1, group)
    scale = theirs.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    assert np.allclose(found, (torch.round(theirs / scale) * scale).reshape(40, 64).numpy(), atol=1e-6)
    assert rounded(values, 16, group) is values


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (CheckpointError("/home/somebody/model.safetensors is damaged."), "model.safetensors is damaged"),
        (np.nan, "nan"),
        (np.inf, "nan"),
    ],
)
def test_what_cannot_be_computed_costs_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, why: str
) -> None:
    """The model file took hours, perhaps: the bundle is complete and says what it lacks."""
    real = FloatModel.logits

    def logits(model: FloatModel, *arguments: Any) -> Any:
        if isinstance(spoil, Exception):
            raise spoil
        return [rows * spoil for rows in real(model, *arguments)]

    monkeypatch.setattr(FloatModel, "logits", logits)
    bundle = made(checkpoint(), tmp_path / "bundle")
    bundle.verify(trust_stamps=False)
    assert bundle.read_selftest() is None
    (note,) = [note for note in bundle.manifest.notes if "there is no self-test" in note]
    assert why in note
    assert "somebody" not in note


def test_a_context_without_room(tmp_path: Path) -> None:
    small = made(checkpoint(), tmp_path / "small", max_context=32)
    assert small.read_selftest() is None
    assert "there is no self-test: no question fits into the context" in small.manifest.notes
