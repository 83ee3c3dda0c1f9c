"""Sizes of a decoder's matrices, from its config.json alone: Gemma, and the families it is compared with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from rkconvert.model.families import FAMILIES as CONVERTED
from rkconvert.model.gemma import GemmaConfig, parse_config
from rkruntime.errors import CheckpointError

_MAX_SIZE: Final = 1 << 24
# Features that make a layer something other than attention and a gated MLP of one size.
_NOT_PLAIN: Final = re.compile(
    r"expert|moe_|ssm|mamba|rwkv|conv_|linear_(num|key|value|attn)|altup|laurel|per_layer_input|recurrent|lru_"
)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix with `rows` outputs and `columns` inputs."""

    name: str
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder whose layers are all alike.

    Attributes:
        layer: Matrices of one layer.
        kv_width: Numbers that one layer caches for one token, keys and values together.
        vectors: Number of weights outside matrices (norms and biases), for the whole model.
        notes: Notes on the numbers.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    layer: tuple[Matrix, ...]
    kv_width: int
    vectors: int
    tied: bool
    notes: tuple[str, ...] = ()

    @property
    def head(self) -> Matrix:
        """The matrix that computes logits; its own or the embedding's."""
        return Matrix("head", self.vocab_size, self.hidden_size)

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        return sum(matrix.weights for matrix in self.layer)

    @property
    def parameters(self) -> int:
        """Number of weights in the checkpoint; a tied embedding counts once."""
        tables = self.head.weights * (1 if self.tied else 2)
        return self.num_hidden_layers * self.layer_weights + tables + self.vectors

    @property
    def digest(self) -> str:
        """Key that a board's results are matched by; the same for models that differ only in their weights."""
        text = json.dumps(asdict(self) | {"notes": ()}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LayerFacts:
    """Facts about a model type that config.json does not state.

    A bias may be the key of config.json that switches it. `keys` maps our names to the family's own. `omitted` has the
    sizes of a config.json that leaves them out, where they are not Llama's.
    """

    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    tied: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    omitted: Mapping[str, int] = field(default_factory=dict)


# Sizes that a config.json may leave out, mostly in its `text_config`: the defaults of transformers' classes
# (https://github.com/huggingface/transformers/tree/main/src/transformers/models, configuration_*.py).
_QWEN_SIZES: Final = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_QWEN_VL_SIZES: Final = {"vocab_size": 152064, "num_key_value_heads": 8, "max_position_embeddings": 32768}
_QWEN3_VL_SIZES: Final = {
    "vocab_size": 151936, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 128000,
}  # fmt: skip
_GEMMA3_SIZES: Final = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131072,
}  # fmt: skip
_LLAMA: Final = LayerFacts(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_QWEN2_VL: Final = LayerFacts(qkv_bias=True, omitted=_QWEN_VL_SIZES)
_QWEN3: Final = LayerFacts(
    qk_norm=True, qkv_bias="attention_bias", out_bias="attention_bias", omitted={**_QWEN_SIZES, "head_dim": 128}
)
_GLM_KEYS: Final = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "max_position_embeddings": "seq_length",
}
_TELECHAT_KEYS: Final = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "seq_length",
}
# model_type of config.json -> family; Gemma 1 and 2 have their own parser in gemma.py.
MODEL_TYPES: Final[Mapping[str, LayerFacts]] = {
    "llama": _LLAMA,
    "mistral": LayerFacts(omitted={"num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "smollm3": replace(_LLAMA, tied=True, omitted={"num_key_value_heads": 4, "max_position_embeddings": 32768}),
    "qwen2": LayerFacts(qkv_bias=True, omitted=_QWEN_SIZES),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3": _QWEN3,
    "qwen3_vl_text": replace(_QWEN3, omitted=_QWEN3_VL_SIZES),
    "gemma3_text": replace(_QWEN3, norms=4, tied=True, omitted=_GEMMA3_SIZES),
    "phi3": LayerFacts(omitted={"max_position_embeddings": 4096}),
    "minicpm": LayerFacts(tied=True),
    "minicpm3": LayerFacts(tied=True),
    "internlm2": LayerFacts(qkv_bias="bias", out_bias="bias"),
    "chatglm": LayerFacts(qkv_bias="add_qkv_bias", keys=_GLM_KEYS),
    "telechat": LayerFacts(out_bias=True, keys=_TELECHAT_KEYS),
}


def parse_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes from a config.json.

    Raises:
        CheckpointError: Not a plain decoder, or a size is missing or impossible.
    """
    if _is_gemma(config):
        return _of_gemma(parse_config(config))
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and "hidden_size" not in config:
        inherited = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        shape = parse_shape({**inherited, **nested, "text_config": None})
        return _with_note(shape, "only the language part; parts that read images or sound are not counted")
    _refuse_unusual(config)
    model_type = config.get("model_type")
    family = MODEL_TYPES.get(str(model_type))
    if family is None:
        shape = _parse(config, str(model_type), _LLAMA)
        return _with_note(shape, f"the model type {model_type!r} is unknown and was read as if it were Llama's")
    return _parse(config, str(model_type), family)


def _is_gemma(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    architectures = [family.architecture for family in CONVERTED.values()]
    known = isinstance(names, list) and any(name in names for name in architectures)
    return known or (not names and config.get("model_type") in list(CONVERTED))


def _of_gemma(config: GemmaConfig) -> ModelShape:
    tensors = config.tensors()
    prefix = "model.layers.0."
    layer = tuple(
        Matrix(name.removeprefix(prefix).removesuffix(".weight").split(".")[-1], *shape)
        for name, shape in tensors.items()
        if name.startswith(prefix) and len(shape) == 2
    )
    return ModelShape(
        family=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        max_position_embeddings=config.max_position_embeddings,
        layer=layer,
        kv_width=2 * config.num_key_value_heads * config.head_dim,
        vectors=sum(shape[0] for shape in tensors.values() if len(shape) == 1),
        tied=config.tie_word_embeddings,
    )


def _refuse_unusual(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    kinds = config.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise CheckpointError(f"config.json: layer_types is {str(kinds)[:80]!r}; it must be a list.")
    other = sorted({str(kind)[:80] for kind in kinds or ()} - {"full_attention", "sliding_attention"})
    keys = sorted(key for key, value in config.items() if value and _NOT_PLAIN.search(key))
    if other or keys:
        raise CheckpointError(
            f"A {model_type} is not a plain decoder: {', '.join([*other, *keys][:4])} in its config.json.",
            hint="Layers must be attention and a gated MLP of one size. Known are gemma, gemma2, "
            + ", ".join(MODEL_TYPES)
            + ".",
        )


def _parse(config: Mapping[str, Any], model_type: str, family: LayerFacts) -> ModelShape:
    read = _ConfigReader(config, family)
    hidden, layers, vocab = read.size("hidden_size"), read.size("num_hidden_layers"), read.size("vocab_size")
    heads, inner = read.size("num_attention_heads"), read.size("intermediate_size")
    attention, kv_width, vectors = _attention(read, hidden, heads)
    mlp = (Matrix("gate_proj", inner, hidden), Matrix("up_proj", inner, hidden), Matrix("down_proj", hidden, inner))
    if read.flag(family.mlp_bias):
        vectors += 2 * inner + hidden
    tied = config.get("tie_word_embeddings")
    return ModelShape(
        family=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        max_position_embeddings=read.size("max_position_embeddings", default=2048),
        layer=attention + mlp,
        kv_width=kv_width,
        vectors=layers * (vectors + family.norms * hidden) + hidden,
        tied=family.tied if tied is None else bool(tied),
    )


def _attention(read: _ConfigReader, hidden: int, heads: int) -> tuple[tuple[Matrix, ...], int, int]:
    """Return attention's matrices, the width of its cache, and the number of weights in its norms and biases."""
    if read.config.get("kv_lora_rank"):
        return _latent_attention(read, hidden, heads)
    kv_heads = read.size("num_key_value_heads", default=heads)
    head_dim = read.size("head_dim", default=hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads.")
    query, key = heads * head_dim, kv_heads * head_dim
    matrices = (
        Matrix("q_proj", query, hidden),
        Matrix("k_proj", key, hidden),
        Matrix("v_proj", key, hidden),
        Matrix("o_proj", hidden, query),
    )
    vectors = (query + 2 * key) * read.flag(read.family.qkv_bias) + hidden * read.flag(read.family.out_bias)
    return matrices, 2 * key, vectors + 2 * head_dim * read.family.qk_norm


def _latent_attention(read: _ConfigReader, hidden: int, heads: int) -> tuple[tuple[Matrix, ...], int, int]:
    """Return the same as `_attention` for keys and values from one compressed vector, as in DeepSeek and MiniCPM3.

    The cache is counted in expanded form: there is no sign that RKLLM keeps the compressed one.
    """
    q_rank, kv_rank = read.size("q_lora_rank"), read.size("kv_lora_rank")
    plain, rotary = read.size("qk_nope_head_dim"), read.size("qk_rope_head_dim")
    value = read.size("v_head_dim", default=hidden // heads)
    matrices = (
        Matrix("q_a_proj", q_rank, hidden),
        Matrix("q_b_proj", heads * (plain + rotary), q_rank),
        Matrix("kv_a_proj", kv_rank + rotary, hidden),
        Matrix("kv_b_proj", heads * (plain + value), kv_rank),
        Matrix("o_proj", hidden, heads * value),
    )
    return matrices, heads * (plain + rotary + value), q_rank + kv_rank


@dataclass(frozen=True)
class _ConfigReader:
    config: Mapping[str, Any]
    family: LayerFacts

    def size(self, name: str, default: int | None = None) -> int:
        key = self.family.keys.get(name, name)
        # null is another case: transformers then computes the size, as for Llama.
        value = self.config.get(key, self.family.omitted.get(name))
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"config.json has no {key}, so the model's size is unknown.")
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be a whole number from 1 to {_MAX_SIZE}.")
        return value

    def flag(self, bias: bool | str) -> bool:
        return bool(self.config.get(bias)) if isinstance(bias, str) else bias


def _with_note(shape: ModelShape, note: str) -> ModelShape:
    return ModelShape(**{**vars(shape), "notes": (*shape.notes, note)})
