"""The forward pass against transformers, over the shapes that matter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LOGITS, HIDDEN = 2, 1

SHAPES = {
    "plain": {},
    "no grouping of heads": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "query_pre_attn_scalar is not head_dim": {"query_pre_attn_scalar": 7},
    "attention cap saturates": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1},
    "final cap saturates": {"final_logit_softcapping": 1.0},
    "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "window of 5": {"sliding_window": 5},
    "window longer than the prompt": {"sliding_window": 512},
    "twelve layers": {"num_hidden_layers": 12},
    "head_dim that is no multiple of a vector": {"head_dim": 24, "hidden_size": 88, "intermediate_size": 200},
    "heads wider than hidden": {"head_dim": 64, "hidden_size": 64, "query_pre_attn_scalar": 64},
}


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_logits_are_those_of_transformers(
    shape: str, make_model: Any, load: Any, prompt: list[int], tmp_path: Path
) -> None:
    made = make_model(tmp_path / "m.rkemu", dtype="FP32", **SHAPES[shape])
    client = load(made.path)
    assert client.run(prompt, mode=LOGITS) == 0
    expected = made.reference_logits(prompt)
    assert expected.std() > 0.1
    np.testing.assert_allclose(client.events[0][0].logits, expected, atol=1e-3)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "twelve layers"])
def test_w8a8_logits_point_the_same_way(
    shape: str, make_model: Any, load: Any, prompt: list[int], tmp_path: Path
) -> None:
    made = make_model(
        tmp_path / "m.rkemu", spread=2.0, **({"hidden_size": 256, "intermediate_size": 512} | SHAPES[shape])
    )
    client = load(made.path)
    assert client.run(prompt, mode=LOGITS) == 0
    assert cosine(client.events[0][0].logits.ravel(), made.reference_logits(prompt).ravel()) >= 0.999


def w8a8(reference: Any, groups: int) -> Any:
    """The same model with every Linear computed in W8A8 by torch: int8 weights and activations, exact sums."""
    import torch

    def rounded(weight: Any) -> Any:
        grouped = weight.reshape(weight.shape[0], groups, -1)
        scale = grouped.abs().amax(2, keepdim=True) / 127
        scale[scale == 0] = 1
        return (grouped / scale).round().double(), scale.double()

    class W8A8(torch.nn.Module):
        def __init__(self, weight: Any) -> None:
            super().__init__()
            self.whole, self.scale = rounded(weight)

        def forward(self, x: Any) -> Any:
            scale = x.abs().amax(-1, keepdim=True) / 127
            q = (x / scale).round().double().reshape(*x.shape[:-1], groups, -1)
            sums = torch.einsum("...gk,ogk->...og", q, self.whole)
            return ((sums * self.scale[..., 0]).sum(-1) * scale.double()).float()

    model = copy.deepcopy(reference)
    whole, scale = rounded(model.model.embed_tokens.weight.data)
    head = W8A8(model.lm_head.weight.data)
    model.model.embed_tokens.weight.data = (whole * scale).float().reshape(model.model.embed_tokens.weight.shape)
    model.lm_head = head
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, module in list(owner.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(owner, name, W8A8(module.weight.data))
    return model


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("shape", ["plain", "one KV head", "head_dim that is no multiple of a vector"])
def test_w8a8_arithmetic_is_that_of_the_definition(
    shape: str,
    groups: int,
    make_model: Any,
    load: Any,
    prompt: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from transformers.models.gemma2 import modeling_gemma2

    attention = modeling_gemma2.eager_attention_forward

    def with_half_cache(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return attention(module, q, k.half().float(), v.half().float(), *args, **kwargs)

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", with_half_cache)
    # One layer: behind it, a last bit of difference tips over activations halfway between two integers, and grows.
    made = make_model(tmp_path / "m.rkemu", groups=groups, num_hidden_layers=1, **SHAPES[shape])
    client = load(made.path)
    assert client.run(prompt, mode=LOGITS) == 0
    with torch.no_grad():
        expected = w8a8(made.reference, groups)(torch.tensor([prompt])).logits[0].numpy()
    cosines = cosine(client.events[0][0].logits, expected)
    assert cosines.min() >= 0.9997
    assert np.median(cosines) >= 0.999999


def test_twelve_layers_lose_what_w8a8_itself_loses(
    make_model: Any, load: Any, prompt: list[int], tmp_path: Path
) -> None:
    """Random layers pile up rounding errors: torch's W8A8 of the same model says how much of it is the type's."""
    import torch

    made = make_model(tmp_path / "m.rkemu", hidden_size=256, num_hidden_layers=12, spread=2.0)
    client = load(made.path)
    assert client.run(prompt, mode=LOGITS) == 0
    exact = made.reference_logits(prompt).ravel()
    with torch.no_grad():
        definition = w8a8(made.reference, 1)(torch.tensor([prompt])).logits[0].numpy().ravel()
    assert 1 - cosine(client.events[0][0].logits.ravel(), exact) <= 1.25 * (1 - cosine(definition, exact))


def test_gemma_1_has_neither_post_norms_nor_caps(make_model: Any, load: Any, prompt: list[int], tmp_path: Path) -> None:
    made = make_model(tmp_path / "m.rkemu", architecture="gemma", dtype="FP32")
    client = load(made.path)
    assert client.run(prompt, mode=LOGITS) == 0
    np.testing.assert_allclose(client.events[0][0].logits, made.reference_logits(prompt), atol=1e-3)


def test_hidden_states_are_those_after_the_last_norm(
    make_model: Any, load: Any, prompt: list[int], tmp_path: Path
) -> None:
    import torch

    made = make_model(tmp_path / "m.rkemu", dtype="FP32")
    client = load(made.path)
    assert client.run(prompt, mode=HIDDEN) == 0
    with torch.no_grad():
        expected = made.reference.model(torch.tensor([prompt])).last_hidden_state[0].numpy()
    assert client.states == [0, 2]
    np.testing.assert_allclose(client.events[0][0].hidden, expected, atol=1e-3)


def test_greedy_answer_is_that_of_transformers(make_model: Any, load: Any, prompt: list[int], tmp_path: Path) -> None:
    import torch

    made = make_model(tmp_path / "m.rkemu", dtype="FP32", tie_word_embeddings=False)
    client = load(made.path, max_new_tokens=24)
    answer = client.answer(prompt)
    whole = made.reference.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=1, pad_token_id=0
    )
    assert answer == whole[0, len(prompt) :].tolist()
    assert len(set(answer)) > 8
