"""The emulator's libraries, and small Gemma models of transformers written as `.rkemu`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.emulator.client import Client

from rkboard.emulator import build as emulator
from rkruntime.bundle.rkemu import TensorSpec, Writer


@pytest.fixture(autouse=True)
def npu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the NPU memory that another process on this machine holds."""
    monkeypatch.setenv("RKEMU_NPU_STATE", str(tmp_path / "npu"))


@pytest.fixture(scope="session")
def library() -> Callable[[str], Path]:
    """Builds (once) and returns the library of a release, with warnings as errors.

    RKEMU_TEST_SANITIZE names sanitizers; `make test-sanitizers` sets it, with the sanitizer's own library preloaded.
    """
    sanitize = os.environ.get("RKEMU_TEST_SANITIZE")
    return lambda release: emulator.build(release, warnings_are_errors=True, sanitize=sanitize)


@pytest.fixture
def load(library: Callable[[str], Path]) -> Any:
    """Loads a model: `load(path, release="1.2.3", **params)`; handles that are still open are destroyed at the end."""
    clients: list[Client] = []

    def make(
        model: Path,
        release: str = "1.2.3",
        *,
        n_batch: int = 1,
        tokenizer: Callable[[bytes], list[int]] | None = None,
        embedding: Any = None,
        expect: int = 0,
        **params: Any,
    ) -> Client:
        client = Client(library(release), model, release, n_batch, params, tokenizer, embedding)
        clients.append(client)
        assert client.status == expect
        return client

    yield make
    for client in clients:
        if client.handle:
            client.destroy()


_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "gemma2": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
    "gemma": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
}
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
FIRST_BYTE = len(SPECIAL)
FIRST_CHARACTER = FIRST_BYTE + 256


def _tokenizer(vocab: int) -> dict[str, Any]:
    texts = [text.encode() for text in SPECIAL] + [bytes([i]) for i in range(256)]
    texts += [chr(0x100 + i).encode() for i in range(vocab - len(texts))]
    return {
        "tokenizer.text": np.frombuffer(b"".join(texts), np.uint8),
        "tokenizer.offsets": np.cumsum([0, *map(len, texts)]).astype(np.uint32),
        "tokenizer.kinds": np.array([1] * FIRST_BYTE + [2] * 256 + [0] * (vocab - FIRST_CHARACTER), np.uint8),
        "tokenizer.merges": np.zeros((0, 3), np.uint32),
    }


def _quantize(name: str, weight: Any, groups: int) -> dict[str, Any]:
    grouped = weight.reshape(weight.shape[0], groups, -1)
    scale = np.abs(grouped).max(2) / np.float32(127)
    scale[scale == 0] = 1
    whole = np.rint(grouped / scale[:, :, None]).clip(-127, 127).astype(np.int8)
    return {name: whole.reshape(weight.shape), f"{name}.scale": scale.astype(np.float32)}


@dataclass
class Made:
    """A model of transformers and its file."""

    path: Path
    reference: Any
    config: Any

    def reference_logits(self, ids: Sequence[int]) -> Any:
        import torch

        with torch.no_grad():
            return self.reference(torch.tensor([list(ids)])).logits[0].numpy()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Made]:
    """Writes a random Gemma: `make_model(path, architecture, dtype, groups, spread, meta, drop, **config)`."""

    def make(
        path: Path,
        *,
        architecture: str = "gemma2",
        dtype: str = "W8A8",
        groups: int = 1,
        spread: float = 4.0,
        seed: int = 0,
        echo: bool = False,
        meta: dict[str, Any] | None = None,
        drop: Sequence[str] = (),
        **overrides: Any,
    ) -> Made:
        import torch
        from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

        torch.manual_seed(seed)
        settings = {
            "vocab_size": 320,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "attn_implementation": "eager",
        }
        if architecture == "gemma2":
            settings |= {"sliding_window": 16, "query_pre_attn_scalar": 24}
        kinds = {"gemma2": (Gemma2Config, Gemma2ForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}
        config = kinds[architecture][0](**(settings | overrides))
        reference = kinds[architecture][1](config).eval().float()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 if "norm" in name else parameter * spread)
            if echo:  # the layers add nothing, so a tied model says its last token again
                for layer in reference.model.layers:
                    layer.post_attention_layernorm.weight.fill_(-1)
                    layer.post_feedforward_layernorm.weight.fill_(-1)
                reference.model.norm.weight.zero_()
        weights = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}

        tensors: dict[str, Any] = {}

        def add(name: str, weight: Any) -> None:
            tensors.update({name: weight} if dtype == "FP32" else _quantize(name, weight, groups))

        add("token_embd", weights["model.embed_tokens.weight"])
        if not config.tie_word_embeddings:
            add("output", weights["lm_head.weight"])
        for i in range(config.num_hidden_layers):
            for ours, theirs in _MATRICES.items():
                add(f"blk.{i}.{ours}", weights[f"model.layers.{i}.{theirs}.weight"])
            for ours, theirs in _NORMS[architecture].items():
                tensors[f"blk.{i}.{ours}"] = weights[f"model.layers.{i}.{theirs}.weight"]
        tensors["output_norm"] = weights["model.norm.weight"]
        tensors |= _tokenizer(config.vocab_size)
        layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        metadata = {
            "general.kind": "model",
            "general.architecture": architecture,
            "general.name": "random",
            "rkllm.target_platform": "RK3588",
            "rkllm.model_dtype": dtype,
            "rkllm.toolkit_version": "1.1.4",
            "rkllm.max_context": 512,
            "rkllm.npu_core_num": 3,
            "rkllm.chat_template.system": "",
            "rkllm.chat_template.prefix": "",
            "rkllm.chat_template.suffix": "",
            **{
                f"model.{key}": getattr(config, key)
                for key in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "head_dim",
                )
            },
            "model.sliding_window": getattr(config, "sliding_window", None) or 0,
            "model.layer_types": [int(kind == "sliding_attention") for kind in layer_types],
            "model.rms_norm_eps": float(config.rms_norm_eps),
            "model.rope_theta": 10000.0,
            "model.query_pre_attn_scalar": float(getattr(config, "query_pre_attn_scalar", config.head_dim)),
            "model.attn_logit_softcapping": float(getattr(config, "attn_logit_softcapping", None) or 0),
            "model.final_logit_softcapping": float(getattr(config, "final_logit_softcapping", None) or 0),
            "tokenizer.bos_token_id": 2,
            "tokenizer.unk_token_id": 3,
            "tokenizer.add_bos": 1,
            "tokenizer.eos_token_ids": [1, 5],
        } | (meta or {})
        kept = {name: array for name, array in tensors.items() if not name.startswith(tuple(drop) or ("\0",))}
        with Writer(path, metadata, [TensorSpec(name, a.dtype.name, a.shape) for name, a in kept.items()]) as writer:
            for name, array in kept.items():
                writer.write(name, array)
        return Made(path, reference, config)

    return make


@pytest.fixture(scope="session")
def small(make_model: Callable[..., Made], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A W8A8 model that most tests share."""
    return make_model(tmp_path_factory.mktemp("small") / "small.rkemu")


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    """60 ids, longer than the sliding window of the models here."""
    return [int(i) for i in np.random.default_rng(1).integers(FIRST_BYTE, 320, 60)]


@pytest.fixture(scope="session")
def talker(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An untied model, whose answers are not its own input again."""
    return make_model(tmp_path_factory.mktemp("talker") / "talker.rkemu", tie_word_embeddings=False)
