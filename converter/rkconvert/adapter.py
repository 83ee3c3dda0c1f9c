"""A LoRA folder as peft's save_pretrained writes it: settings and matrices, matched to a base model's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rkconvert.formats import FLOATS, all_finite, to_float32
from rkconvert.shards import Shard, read_json
from rkruntime.errors import AdapterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_MATRIX: Final = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings that change what the matrices mean, and are not merged.
_REFUSED: Final = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules (modules_to_save)",
    "lora_bias": "a bias in its matrices (lora_bias)",
    "layer_replication": "repeated layers (layer_replication)",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "target_parameters": "parameters instead of modules (target_parameters)",
    "alora_invocation_tokens": "activation by tokens (aLoRA), which no merged model can do",
    "arrow_config": "a router (Arrow), which no merged model can do",
    "use_qalora": "QALoRA's pooled inputs",
}


@dataclass(frozen=True)
class LoraPair:
    """The update of one matrix: weight + scaling * (b @ a), a is [rank, in], b is [out, rank], both float32."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.

    Attributes:
        base_name: what it says its base model is (may be empty).
        pairs: by the base model's tensor name, such as `model.layers.0.self_attn.q_proj.weight`.
        weight_file: for the hash in the manifest.
    """

    path: Path
    base_name: str
    pairs: Mapping[str, LoraPair]
    weight_file: Path


def open_adapter(path: Path, base: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read an adapter and match it to a base model's tensors, given by name and shape.

    Raises:
        AdapterError: not an adapter, a kind that is not supported, or one that was made for another base.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        raise AdapterError(f"{path} is not an adapter: it has no {ADAPTER_CONFIG}.")
    config = read_json(path / ADAPTER_CONFIG, AdapterError)
    _check_kind(config)
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(f"{path} has no {ADAPTER_WEIGHTS}.")
    shard = Shard(path / ADAPTER_WEIGHTS, AdapterError)
    matrices: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name in shard.entries:
        module, side = _split(name)
        matrices.setdefault(module, {})[side] = _read(shard, name)
    shard.close()
    if not matrices:
        raise AdapterError(f"{shard.path} holds no LoRA matrices.")
    _check_targets(config, base)
    pairs = {f"{module}.weight": _pair(module, sides, config, base) for module, sides in matrices.items()}
    return Adapter(path, str(config.get("base_model_name_or_path") or ""), pairs, path / ADAPTER_WEIGHTS)


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"The adapter is of peft's type {kind!r}; only LORA can be merged into the weights.")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"The adapter has {meaning}, which is not supported.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"The adapter trained biases (bias={config['bias']!r}); Gemma has none.")


def _split(name: str) -> tuple[str, str]:
    match = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
    if not match:
        raise AdapterError(f"The adapter has the tensor {name}, which is no LoRA matrix of a linear layer.")
    return match["module"], match["side"]


def _read(shard: Shard, name: str) -> NDArray[np.float32]:
    info = shard.entries[name].info
    if info.dtype not in FLOATS or len(info.shape) != 2:
        raise AdapterError(f"The adapter's tensor {name} is {info.dtype} {list(info.shape)}, not a matrix of floats.")
    block = shard.read(name, 0, info.shape[0])
    if not all_finite(block, info.dtype):
        raise AdapterError(f"The adapter's tensor {name} has NaN or infinite values: its training diverged.")
    # peft holds adapters in float32, whatever they were saved as.
    return to_float32(block, info.dtype)


def _check_targets(config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Names of target_modules that the base has not; a regular expression shows in the tensors only."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return
    known = {part for name in base for part in _suffixes(name.removesuffix(".weight"))}
    unknown = sorted(str(target) for target in targets if target not in known)
    if unknown:
        raise AdapterError(
            f"The adapter targets {', '.join(unknown)}, and the base model has no module of that name.",
            hint="It was trained on another architecture: give the base model that it names, "
            f"{config.get('base_model_name_or_path') or '(none named)'}.",
        )


def _suffixes(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[at:]) for at in range(len(parts)))


def _pair(
    module: str,
    sides: Mapping[str, NDArray[np.float32]],
    config: Mapping[str, Any],
    base: Mapping[str, tuple[int, ...]],
) -> LoraPair:
    shape = base.get(f"{module}.weight")
    if shape is None:
        raise AdapterError(f"The adapter changes {module}, which the base model has not.")
    if set(sides) != {"A", "B"}:
        raise AdapterError(f"The adapter has only the matrix lora_{min(sides)} of {module}.")
    a, b = sides["A"], sides["B"]
    rank = _setting(config, "rank_pattern", "r", module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"The adapter's matrices for {module} have rank {a.shape[0]} and {b.shape[1]};"
            f" its {ADAPTER_CONFIG} says {rank:g}."
        )
    if (b.shape[0], a.shape[1]) != shape:
        raise AdapterError(
            f"The adapter's update of {module} is {b.shape[0]} x {a.shape[1]}; the base model's matrix is"
            f" {' x '.join(map(str, shape))}.",
            hint="It was trained on a model of another size: give its own base model.",
        )
    alpha = _setting(config, "alpha_pattern", "lora_alpha", module)
    return LoraPair(a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _setting(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """A module's own rank or alpha: the first matching pattern, as peft's get_pattern_key does it."""
    value = config.get(default)
    for pattern, own in (config.get(patterns) or {}).items():
        if _matches(str(pattern), module):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise AdapterError(f"{ADAPTER_CONFIG}: {default} of {module} is {value!r}; it must be a positive number.")
    return value


def _matches(pattern: str, module: str) -> bool:
    # A repeated group, or many repeats, can make a search take for ever; patterns come from strangers.
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4 or len(pattern) > 1000:
        raise AdapterError(f"{ADAPTER_CONFIG}: the pattern {pattern[:80]!r} is too complex to be searched for safely.")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise AdapterError(f"{ADAPTER_CONFIG}: {pattern!r} is not a regular expression: {error}.") from error
