"""LoRA adapters at run time, against peft's arithmetic on the same model of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkruntime.bundle.rkemu import TensorSpec, Writer, read_container

LOGITS = 2
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
RANK, ALPHA = 5, 8.0


@pytest.fixture
def made(make_model: Any, tmp_path: Path) -> Any:
    return make_model(tmp_path / "base.rkemu", dtype="FP32", tie_word_embeddings=False)


def write_adapter(path: Path, made: Any, *, parts: tuple[str, ...] = tuple(NAMES), **meta: Any) -> Any:
    """An adapter file and the base with `alpha / rank * B A` added to its weights, which is what peft merges."""
    import torch

    rng = np.random.default_rng(3)
    merged = copy.deepcopy(made.reference)
    tensors = {}
    for i, layer in enumerate(merged.model.layers):
        for ours in parts:
            weight = layer.get_submodule(NAMES[ours]).weight
            a = rng.normal(0, 0.1, (RANK, weight.shape[1])).astype(np.float32)
            b = rng.normal(0, 0.1, (weight.shape[0], RANK)).astype(np.float32)
            tensors[f"blk.{i}.{ours}.lora_a"], tensors[f"blk.{i}.{ours}.lora_b"] = a, b
            with torch.no_grad():
                weight += torch.from_numpy(ALPHA / RANK * (b @ a))
    metadata = {
        "general.kind": "adapter", "adapter.alpha": ALPHA,
        "adapter.base_fingerprint": read_container(made.path).fingerprint,
    } | meta  # fmt: skip
    with Writer(path, metadata, [TensorSpec(name, a.dtype.name, a.shape) for name, a in tensors.items()]) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return merged


def add(client: Any, path: Path, name: str = "pirate", scale: float = 1.0) -> int:
    adapter = client.layout.LoraAdapter(str(path).encode(), name.encode(), scale)
    import ctypes

    return int(client.lib.rkllm_load_lora(client.handle, ctypes.byref(adapter)))


@pytest.mark.parametrize("parts", [tuple(NAMES), ("attn_q", "ffn_down")])
def test_logits_with_an_adapter(
    parts: tuple[str, ...], made: Any, load: Any, prompt: list[int], tmp_path: Path
) -> None:
    import torch

    merged = write_adapter(tmp_path / "lora.rkemu", made, parts=parts)
    client = load(made.path)
    assert add(client, tmp_path / "lora.rkemu") == 0
    assert client.run(prompt, mode=LOGITS, lora="pirate") == 0
    with torch.no_grad():
        expected = merged(torch.tensor([prompt])).logits[0].numpy()
    assert np.abs(expected - made.reference_logits(prompt)).max() > 0.1
    np.testing.assert_allclose(client.events[0][0].logits, expected, atol=1e-3)


@pytest.mark.parametrize("release", ["1.1.4", "1.2.0", "1.2.3", "1.3.0"])
def test_runs_switch_between_base_and_adapter(
    release: str, made: Any, load: Any, prompt: list[int], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "lora.rkemu", made)
    client = load(made.path, release)
    base = client.answer(prompt)
    assert add(client, tmp_path / "lora.rkemu") == 0
    assert client.answer(prompt) == base
    pirate = client.answer(prompt, lora="pirate")
    assert pirate != base
    assert client.answer(prompt, lora="pirate") == pirate
    assert client.answer(prompt) == base
    assert client.run(prompt, lora="unknown") == -1


def test_scale(made: Any, load: Any, prompt: list[int], tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora.rkemu", made)
    client = load(made.path)
    assert add(client, tmp_path / "lora.rkemu", "none", 0.0) == 0
    assert add(client, tmp_path / "lora.rkemu", "nan", float("nan")) == -1
    assert client.answer(prompt, lora="none") == client.answer(prompt)


def test_adapters_that_do_not_fit(
    made: Any, make_model: Any, load: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = load(made.path)
    path = tmp_path / "lora.rkemu"

    def refused(text: str) -> None:
        capfd.readouterr()
        assert add(client, path) == -1
        assert text in capfd.readouterr().err

    refused("failed to open")
    write_adapter(path, made, **{"adapter.base_fingerprint": "00000000"})
    refused("model arch and LoRA arch mismatch")
    other = make_model(tmp_path / "other.rkemu", hidden_size=64, dtype="FP32")
    write_adapter(path, other, **{"adapter.base_fingerprint": ""})
    refused("has another type or shape")
    deeper = make_model(tmp_path / "deeper.rkemu", num_hidden_layers=3, dtype="FP32")
    write_adapter(path, deeper, **{"adapter.base_fingerprint": ""})
    refused("model arch and LoRA arch mismatch")
    path.write_bytes(made.path.read_bytes())
    refused("not an adapter")
    write_adapter(path, made)
    path.write_bytes(path.read_bytes()[:-200])
    refused("invalid rkllm model!")
    data = bytearray(made.path.read_bytes())
    path.write_bytes(bytes(data[:3]))
    refused("invalid rkllm model!")
