"""Small real models and adapters, made by transformers and peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from rkconvert.demo import tokenizer as demo_tokenizer
from rkconvert.tensors.formats import to_float32

FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "max_position_embeddings": 1024,
}


@pytest.fixture(autouse=True)
def others_warnings() -> Any:
    """peft calls names that transformers 5 has deprecated; that is theirs to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return demo_tokenizer.build(["The NPU of an RK3588 has three cores, hello world."] * 20)


@pytest.fixture
def make_model(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """A checkpoint folder: `make_model(name, dtype, shard_size, seed, **settings of its config.json)`."""

    def make(
        name: str = "base",
        dtype: torch.dtype = torch.bfloat16,
        shard_size: str = "100KB",
        seed: int = 0,
        family: str = "gemma2",
        **settings: Any,
    ) -> Path:
        torch.manual_seed(seed)
        kinds = {"gemma2": (Gemma2Config, Gemma2ForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}
        config, model = kinds[family]
        sizes = {key: value for key, value in SIZES.items() if family == "gemma2" or hasattr(config(), key)}
        made = model(config(**sizes | settings)).to(dtype)
        for parameter in made.parameters():
            if parameter.ndim == 1:  # norms begin as zeros
                parameter.data.normal_(std=0.1)
        made.save_pretrained(tmp_path / name, max_shard_size=shard_size)
        demo_tokenizer.save(tokenizer, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """An adapter folder for a base: `make_adapter(base, name, dtype, seed, prepare, **settings of LoraConfig)`."""

    def make(
        base: Path,
        name: str = "lora",
        dtype: torch.dtype | None = None,
        seed: int = 1,
        prepare: Callable[[Any], None] = lambda model: None,
        **settings: Any,
    ) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        prepare(model)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                # As if it had been trained: B begins as zeros, magnitudes as norms.
                parameter.data += torch.randn_like(parameter) * (0.02 if "lora_" in key else 0.05)
        if dtype is not None:
            adapted = adapted.to(dtype)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def peft_merge() -> Callable[..., dict[str, torch.Tensor]]:
    """State of the model that peft's merge_and_unload makes of a base and adapters given as {folder: weight}."""

    def merge(base: Path, adapters: dict[Path, float], grow_to: int = 0) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(base)
        if grow_to:
            model.resize_token_embeddings(grow_to, mean_resizing=False)
        names = [f"a{at}" for at in range(len(adapters))]
        first, *rest = zip(names, adapters, strict=True)
        adapted = PeftModel.from_pretrained(model, first[1], adapter_name=first[0])
        for name, path in rest:
            adapted.load_adapter(path, adapter_name=name)
        for name, weight in zip(names, adapters.values(), strict=True):
            for module in adapted.modules():
                if weight != 1 and isinstance(module, LoraLayer) and name in module.scaling:
                    module.scaling[name] *= weight
        return adapted.merge_and_unload(adapter_names=names).state_dict()

    return merge


@pytest.fixture
def bits() -> Callable[[torch.Tensor], np.ndarray]:
    """A tensor as the converter holds it: bfloat16 as uint16."""

    def to_bits(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().contiguous()
        return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()

    return to_bits


@pytest.fixture
def assert_merged(bits: Any) -> Callable[[str, np.ndarray, torch.Tensor], None]:
    """That a merged tensor is another library's, but for float32 sums that are rounded otherwise.

    How a BLAS adds up a product's terms depends on the processor, so torch's and numpy's may differ by a step of the
    format, in few elements. Anything else that is wrong differs in many, or by more.
    """

    def check(name: str, mine: np.ndarray, theirs: torch.Tensor) -> None:
        expected = bits(theirs)
        assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape), name
        other = np.nonzero(mine != expected)
        assert len(other[0]) <= max(1, mine.size // 500), name
        a, b = (to_float32(values[other], FORMATS[theirs.dtype]) for values in (mine, expected))
        step = np.maximum(np.abs(a), np.abs(b)) * torch.finfo(theirs.dtype).eps
        np.testing.assert_array_less(np.abs(a - b), step + 1e-6 * float(theirs.abs().max()) + 1e-30, err_msg=name)

    return check


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file; None removes one."""

    def edit(path: Path, **changes: Any) -> None:
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content))

    return edit
