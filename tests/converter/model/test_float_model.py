"""The streamed float model against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.model.float_model import FloatModel
from rkconvert.sources.checkpoint import open_checkpoint

Make = Callable[..., Path]
PROMPTS = ([2, 106, 400, 7, 900, 107], [2], list(range(100, 170)))


def transformers_logits(model: Any, prompt: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt])).logits[0].float().numpy()


def same(mine: list[np.ndarray], model: Any, last: int) -> bool:
    for prompt, found in zip(PROMPTS, mine, strict=True):
        expected = transformers_logits(model, prompt)[-last:]
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
    return True


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": False},
        {"sliding_window": 8, "query_pre_attn_scalar": 33, "final_logit_softcapping": None},
        {"attn_logit_softcapping": 0.5, "rope_theta": 500.0, "rms_norm_eps": 1e-2, "num_key_value_heads": 4},
        {"family": "gemma"},
        {"family": "gemma", "num_key_value_heads": 1, "tie_word_embeddings": False},
    ],
)
def test_every_kind_of_model(make_model: Make, settings: dict[str, Any]) -> None:
    folder = make_model(**settings)
    opened, read = open_checkpoint(folder), []
    mine = FloatModel(opened.weights, opened.config, read.append).logits(PROMPTS, 9)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert same(mine, model, 9)
    assert [len(rows) for rows in mine] == [6, 1, 9]
    # Each weight is read once; single rows of the embedding count as none.
    tied = opened.config.tie_word_embeddings
    stored = sum(info.nbytes for name, info in opened.weights.tensors.items() if tied or "embed_tokens" not in name)
    assert sum(read) == stored


def test_with_an_adapter(make_model: Make, make_adapter: Make, peft_merge: Callable[..., Any]) -> None:
    base = make_model(dtype=torch.float32)
    adapter = make_adapter(base)
    merged = merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
    mine = FloatModel(merged.weights, merged.weights.config).logits(PROMPTS, 100)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(peft_merge(base, {adapter: 1}))
    assert same(mine, model, 100)
