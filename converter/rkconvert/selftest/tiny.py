"""A tiny random Gemma 2, its adapter and its calibration data: small, but as wide as the toolkit's exporter wants."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

import numpy as np

from rkconvert import demo
from rkconvert.adapters.config import FILE as ADAPTER_CONFIG
from rkconvert.calibrate.build import Builder
from rkconvert.calibrate.chats import Dialogue
from rkconvert.calibrate.dataset import TokenCounter, write_dataset
from rkconvert.demo.tokenizer import VOCAB_SIZE
from rkconvert.model.chat_template import read_template
from rkconvert.model.gemma import parse_config
from rkconvert.output.hf_folder import forget_shards, write_json, write_weights
from rkconvert.selftest.vocabulary import sentencepiece_model
from rkconvert.sources.checkpoint import CONFIG
from rkconvert.tensors.formats import from_float32
from rkconvert.tensors.weights import TensorInfo
from rkruntime.bundle.manifest import GENERATION_CONFIG, TEMPLATE, TOKENIZER
from rkruntime.text.template import BOS, Message
from rkruntime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTEXT: Final = 2048
"""Not any release's default, so that the log shows whether it is obeyed."""
VOCABULARY_FILE: Final = "tokenizer.model"
# Matrices have multiples of 512, the largest group, on both sides; heads are as wide as Gemma 2's own.
_SIZES: Final = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 64,
    "max_position_embeddings": 4096,
}
HEAD_WEIGHTS: Final = VOCAB_SIZE * _SIZES["hidden_size"]
_RANK: Final = 8
_MODULES: Final = ("q_proj", "v_proj")
_TOKENIZER: Final = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", TEMPLATE, GENERATION_CONFIG)


@dataclass(frozen=True)
class RandomWeights:
    """Random tensors of these shapes in bfloat16, the same in every run (a `rkconvert.tensors.weights.Weights`)."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `Weights`."""
        return {name: TensorInfo("BF16", shape) for name, shape in self.shapes.items()}

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """See `Weights`."""
        shape = self.shapes[name]
        # A layer keeps the size of what goes through it; norms, which are added to 1, stay near it.
        width = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        values = np.random.default_rng(crc32(name.encode())).normal(scale=width, size=shape).astype(np.float32)
        return from_float32(values[first : first + count], "BF16")


def write_model(folder: Path, *, own_head: bool = False, vocabulary_file: bool = True) -> None:
    """Write the checkpoint into the new `folder`: Gemma's layout, with the demo model's vocabulary of 1024 tokens.

    Args:
        own_head: With a head that is not the embedding.
        vocabulary_file: With tokenizer.model, which Google's own folders have.
    """
    folder.mkdir()
    source = demo.checkpoint()
    config = {**json.loads((source / CONFIG).read_bytes()), **_SIZES, "tie_word_embeddings": not own_head}
    write_json(folder / CONFIG, config)
    for name in _TOKENIZER:
        shutil.copyfile(source / name, folder / name)
    if vocabulary_file:
        tokenizer = json.loads((source / TOKENIZER).read_bytes())
        (folder / VOCABULARY_FILE).write_bytes(sentencepiece_model(tokenizer))
    write_weights(folder, RandomWeights(parse_config(config).tensors()), lambda _: None)
    forget_shards(folder)


def write_adapter(folder: Path, model: Path) -> None:
    """Write a LoRA for the checkpoint `model` into the new `folder`, as peft saves one."""
    folder.mkdir()
    settings = json.loads((demo.adapter() / ADAPTER_CONFIG).read_bytes())
    settings |= {"r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": list(_MODULES), "base_model_name_or_path": None}
    write_json(folder / ADAPTER_CONFIG, settings)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parse_config(json.loads((model / CONFIG).read_bytes())).tensors().items():
        module = name.removesuffix(".weight")
        if module.endswith(_MODULES):
            shapes[f"base_model.model.{module}.lora_A.weight"] = (_RANK, shape[1])
            shapes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], _RANK)
    write_weights(folder, RandomWeights(shapes), lambda _: None)
    forget_shards(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def write_calibration(path: Path, model: Path) -> None:
    """Write calibration data for the checkpoint `model`: the demo's questions and answers in its chat template."""
    template, file = read_template(model, BOS), model / TOKENIZER
    builder = Builder(template, Tokenizer.parse(file.read_bytes(), file), TokenCounter(file), CONTEXT)
    chats = [Dialogue((Message("user", item.question),), item.answer, "demo") for item in demo.questions()]
    write_dataset(path, builder.build(chats, lambda _: None).rows)
