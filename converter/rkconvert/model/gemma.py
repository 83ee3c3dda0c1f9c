"""Gemma 1 and 2 as described by config.json, and the tensors that such a model must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rkconvert.model.families import FAMILIES
from rkconvert.model.family import EMBEDDING, FINAL_NORM, HEAD, Family
from rkruntime.errors import CheckpointError

# Larger values are typos or attacks: 27B has 46 layers, a width of 36864 and 256000 tokens.
_MAX_SIZE: Final = 1 << 20
_SIZES: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# Switches of transformers' features, with the values under which a model has none of them.
_PLAIN_FEATURES: Final = {
    "attention_bias": False,
    "use_bidirectional_attention": False,
    "is_causal": True,
    "per_layer_config": False,
}
_NAMES: Final = {
    2_614_341_888: "2B",
    9_241_705_984: "9B",
    27_227_128_320: "27B",
    2_506_172_416: "2B",
    8_537_680_896: "7B",
}


@dataclass(frozen=True)
class GemmaConfig:
    """Settings of one model, named as in config.json.

    `sliding_window`, `attn_logit_softcapping` and `final_logit_softcapping` are 0 if absent; `sliding_layers` says for
    each layer whether its attention is limited to the window.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    query_pre_attn_scalar: float
    sliding_window: int
    sliding_layers: tuple[bool, ...]
    attn_logit_softcapping: float
    final_logit_softcapping: float
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        total = 0
        for shape in self.tensors().values():
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
        return total

    @property
    def size_name(self) -> str:
        """`2B`, `7B`, `9B`, `27B` for Google's sizes, else the number of weights such as `1.1M`."""
        count = self.parameters
        if count in _NAMES:
            return _NAMES[count]
        return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the model by name, in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in self._layer().items()}
        shapes[FINAL_NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer(self) -> dict[str, tuple[int, ...]]:
        sizes = {
            "hidden": self.hidden_size,
            "inner": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "key": self.num_key_value_heads * self.head_dim,
        }
        parts = FAMILIES[self.family].parts
        return {f"{part.hf}.weight": tuple(sizes[name] for name in part.shape) for part in parts}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json. Raises CheckpointError, listing the supported ones, for any other model."""
    names = config.get("architectures") or []
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    model_type = config.get("model_type")
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    for name in names:
        if family := by_architecture.get(name):
            if model_type not in (None, family.model_type):
                raise CheckpointError(f"config.json contradicts itself: a {name} of the model_type {model_type!r}.")
            return family
    if not names and isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if not names and model_type is None:
        raise CheckpointError("config.json names neither an architecture nor a model_type.")
    raise CheckpointError(
        f"The checkpoint is a {', '.join(names) or model_type}; supported are {', '.join(by_architecture)}.",
        hint="Convert a Gemma 2 (or Gemma 1) text model; `rkedge plan` can also size other decoders.",
    )


def parse_config(config: Mapping[str, Any]) -> GemmaConfig:
    """Check config.json and fill in what it may omit.

    Raises:
        CheckpointError: Another architecture, a value of the wrong type, or a feature that the two families lack.
    """
    family = family_of(config)
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    for key in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key, 0) is None or key not in family.defaults:
            values[key] = 0
    values["rope_theta"] = _rope_theta(config, values["rope_theta"])
    if "query_pre_attn_scalar" not in family.defaults:
        values["query_pre_attn_scalar"] = values["head_dim"]
    _refuse_features(config, family)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in family.defaults and config.get(key, 1) == 0:
            raise CheckpointError(
                f"config.json: {key} is 0, by which transformers divides.", hint="Write null for no cap."
            )
    if "sliding_window" in family.defaults and config.get("sliding_window", 1) == 0:
        raise CheckpointError(
            "config.json: sliding_window is 0: no token would see any other.", hint="Write null for no window."
        )
    sizes = {key: _integer(key, values[key], 1, _MAX_SIZE) for key in _SIZES}
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        raise CheckpointError(
            f"config.json: {sizes['num_attention_heads']} attention heads cannot share"
            f" {sizes['num_key_value_heads']} key/value heads of {sizes['head_dim']}."
        )
    return GemmaConfig(
        family=family.model_type,
        **sizes,
        rms_norm_eps=_number("rms_norm_eps", values["rms_norm_eps"]),
        rope_theta=_number("rope_theta", values["rope_theta"]),
        query_pre_attn_scalar=_number("query_pre_attn_scalar", values["query_pre_attn_scalar"]),
        sliding_window=_integer("sliding_window", values["sliding_window"], 0, _MAX_SIZE),
        sliding_layers=_sliding_layers(config, sizes["num_hidden_layers"], bool(values["sliding_window"])),
        attn_logit_softcapping=_number("attn_logit_softcapping", values["attn_logit_softcapping"], least=0.0),
        final_logit_softcapping=_number("final_logit_softcapping", values["final_logit_softcapping"], least=0.0),
        tie_word_embeddings=values["tie_word_embeddings"],
        bos_token_id=_integer("bos_token_id", values["bos_token_id"], 0, sizes["vocab_size"] - 1),
        eos_token_ids=token_ids("eos_token_id", values["eos_token_id"], sizes["vocab_size"]),
    )


def token_ids(key: str, value: Any, vocab_size: int, file: str = "config.json") -> tuple[int, ...]:
    """Check one id or a list of ids, as in config.json and generation_config.json."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise CheckpointError(f"{file}: {key} is an empty list: no token would end an answer.")
    return tuple(dict.fromkeys(_integer(key, item, 0, vocab_size - 1, file) for item in items))


def _integer(key: str, value: Any, least: int, most: int, file: str = "config.json") -> int:
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"{file}: {key} is {value!r}; it must be a whole number from {least} to {most}.")
    return value


def _number(key: str, value: Any, least: float = 1e-30) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e30:
        raise CheckpointError(f"config.json: {key} is {value!r}; it must be a number above {least:g}.")
    return float(value)


def _rope_theta(config: Mapping[str, Any], default: Any) -> Any:
    """Read the settings of rotary embeddings: transformers 4 writes rope_theta, transformers 5 rope_parameters."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: {key} is {str(value)[:80]!r}; it must be a table.")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default" or any(isinstance(part, dict) for part in value.values()):
            raise CheckpointError(
                f"config.json: {key} asks for {kind!r} or differs by layer; Gemma 1 and 2 use plain rotary embeddings."
            )
    return (config.get("rope_scaling") or config.get("rope_parameters") or {}).get("rope_theta", default)


def _refuse_features(config: Mapping[str, Any], family: Family) -> None:
    for key, names in family.activations.items():
        if (activation := config.get(key)) is not None and activation not in names:
            raise CheckpointError(f"config.json: {key} is {activation!r}; Gemma's activation is gelu_pytorch_tanh.")
    if not isinstance(tied := config.get("tie_word_embeddings"), bool | None):
        raise CheckpointError(f"config.json: tie_word_embeddings is {tied!r}; it must be true or false.")
    for key, plain in _PLAIN_FEATURES.items():
        if bool(config.get(key, plain)) is not plain:
            raise CheckpointError(f"config.json: {key} is {config[key]!r:.80}, which no conversion supports.")


def _sliding_layers(config: Mapping[str, Any], layers: int, window: bool) -> tuple[bool, ...]:
    kinds = config.get("layer_types")
    if kinds is None:
        # As in transformers: even layers have the window.
        return tuple(window and layer % 2 == 0 for layer in range(layers))
    known = {"sliding_attention": True, "full_attention": False}
    if not isinstance(kinds, list) or len(kinds) != layers or any(str(kind) not in known for kind in kinds):
        raise CheckpointError(f"config.json: layer_types must name {layers} layers, each one of {', '.join(known)}.")
    return tuple(window and known[kind] for kind in kinds)
