"""Every key of config.json, changed: the fp32 emulator computes what transformers computes, or the model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from rkconvert.adapters.merged_model import merged_model
from rkconvert.demo import tokenizer as demo_tokenizer
from rkconvert.emulated.model_file import write_emulator_file
from rkconvert.model.chat_template import read_template
from rkconvert.model.tokenizer import read_tokenizer
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.target import ModelSpec
from rkruntime.errors import CheckpointError

LOGITS = 2
KINDS = {"gemma2": (Gemma2Config, Gemma2ForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}
SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 16,
    "max_position_embeddings": 256, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
}  # fmt: skip
# Keys that the two classes no longer have, have of their relatives, or read without naming them; values to think of.
MORE: dict[str, list[Any]] = {
    "hidden_act": ["relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh", None],
    "hidden_activation": ["relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh", None],
    "rope_theta": [500.0, 1000000, None],
    "rope_scaling": [
        None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "default", "rope_theta": 300.0}, {"type": "default"}, [1],
    ],
    "rope_parameters": [
        None, {}, {"rope_type": "default", "rope_theta": 300.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_theta": 300.0}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 300.0, "factor": 3.0},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {kind: {"rope_type": "default", "rope_theta": 300.0} for kind in ("full_attention", "sliding_attention")},
    ],
    "partial_rotary_factor": [0.5], "layer_types": [None, ["full_attention"] * 2, ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"], ["chunked_attention"] * 2, ["full_attention"]],
    "sliding_window": [1, 2, 4096, 0, None, -1, 7.5], "use_sliding_window": [False], "sliding_window_pattern": [1, 6],
    "query_pre_attn_scalar": [1, 8, 100, None], "attn_logit_softcapping": [None, 1.0, 1e4],
    "final_logit_softcapping": [None, 1.0, 1e4], "attention_bias": [True], "use_bidirectional_attention": [True, "all"],
    "is_causal": [False], "is_decoder": [False], "head_dim": [16, None],
    "tie_word_embeddings": [False, None, "false", 1],
    "model_type": ["gemma", "gemma2", "llama", None], "rms_norm_eps": [1e-2, 0.0, "1e-6"],
    "architectures": [["GemmaForCausalLM"], ["Gemma2ForCausalLM"], ["Gemma2ForSequenceClassification"], [], None],
    "attention_chunk_size": [4], "hidden_size_per_layer_input": [4], "attention_multiplier": [2.0],
    "logit_scale": [0.5],
    "embedding_multiplier": [3.0], "residual_multiplier": [0.5], "logits_scaling": [2.0], "num_kv_shared_layers": [1],
    "dtype": ["bfloat16", "float16", None], "torch_dtype": ["bfloat16"], "pad_token_id": [5, None, 2000],
    "text_config": [{"hidden_size": 16}], "qk_norm": [True], "use_qk_norm": [True], "layer_norm_eps": [0.1],
    "query_rescale_scalar": [2.0], "attn_softcap": [1.0], "_attn_implementation": ["sdpa"],
}  # fmt: skip


def variants(value: Any) -> list[Any]:
    """Other values of the same and of another kind."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 1.5 + 0.1, None]
    return [None] if value is not None else [3]


def changes(family: str) -> Iterator[tuple[str, Any]]:
    defaults = KINDS[family][0]().to_dict()
    for key in sorted(defaults.keys() | MORE.keys()):
        for value in MORE.get(key) or variants(SIZES.get(key, defaults[key])):
            yield key, value


@pytest.fixture(scope="module", params=list(KINDS))
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config, model = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / request.param
    made = model(config(**{key: value for key, value in SIZES.items() if hasattr(config(), key)}))
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3)
    made.save_pretrained(folder)
    demo_tokenizer.save(demo_tokenizer.build(["three cores and a token"] * 10), folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is computed sooner by one thread than several can agree, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_model(folder: Path, path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    spec = ModelSpec(
        model=merged_model(checkpoint, ()), lora=None, template=read_template(folder, "<bos>"),
        tokenizer=read_tokenizer(folder / "tokenizer.json", checkpoint.config.vocab_size),
        platform="rk3588", dtype="fp32", release="1.2.3", max_context=256, npu_cores=3,
    )  # fmt: skip
    write_emulator_file(path, spec, lambda _: None)


def reference(folder: Path, prompt: list[int]) -> Any:
    """transformers' logits, or None for what it does not load, completes with random weights or computes as NaN."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0].numpy()
    except Exception:  # Whatever it cannot do.
        return None
    complete = not found["missing_keys"] and not found["mismatched_keys"] and not found["unexpected_keys"]
    return logits if complete and np.isfinite(logits).all() else None


def test_a_changed_key_is_computed_or_refused(base: Path, load: Any, tmp_path: Path) -> None:
    prompt = [2, *(int(token) for token in np.random.default_rng(0).integers(10, 1024, 40))]
    shutil.copytree(base, tmp_path / "changed")
    original = json.loads((base / "config.json").read_text())
    outcomes: dict[str, list[str]] = {"equal": [], "refused": [], "moved": []}
    wrong = []
    unchanged = reference(base, prompt)
    for key, value in [("nothing", None), *changes(base.name)]:
        case = f"{key}={json.dumps(value)}"
        (tmp_path / "changed" / "config.json").write_text(json.dumps(original | {key: value}))
        try:
            write_model(tmp_path / "changed", tmp_path / "model.rkemu")
        except CheckpointError:
            outcomes["refused"].append(case)
            continue
        if (expected := reference(tmp_path / "changed", prompt)) is None:
            continue
        client = load(tmp_path / "model.rkemu")
        assert client.run(prompt, mode=LOGITS) == 0
        close = np.allclose(client.events[0][0].logits, expected, atol=1e-3)
        outcomes["equal"].append(case)
        wrong += [] if close else [case]
        if not np.allclose(expected, unchanged, atol=1e-2):
            outcomes["moved"].append(case)
    assert not wrong
    assert "nothing=null" in outcomes["equal"]
    # The test can fail: some of the keys change what is computed, and some are refused.
    assert len(outcomes["moved"]) >= 3
    assert len(outcomes["refused"]) >= 20
