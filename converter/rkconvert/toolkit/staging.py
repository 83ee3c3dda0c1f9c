"""The model folder for the toolkit: weights as safetensors, settings that transformers 4 and 5 both read.

It is made afresh for each conversion, so only checked numbers and texts from an untrusted folder reach the toolkit:
no pickles, and no `auto_map`, by which transformers would run the folder's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.adapters.config import FILE as ADAPTER_CONFIG
from rkconvert.adapters.merged_model import MergedModel
from rkconvert.adapters.separate import SeparateLora
from rkconvert.model.chat_template import ChatTemplate
from rkconvert.model.families import FAMILIES
from rkconvert.model.gemma import GemmaConfig
from rkconvert.output.hf_folder import ShardPlan, check_finite, forget_shards, write_json, write_weights
from rkconvert.progress import Advance
from rkconvert.rules.releases import ToolkitRelease
from rkconvert.sources.checkpoint import CONFIG
from rkconvert.sources.names import Renamed
from rkconvert.tensors.shards import Shard, read_json
from rkconvert.tensors.tensor_files import ADAPTER_FILES, MODEL_FILES
from rkconvert.tensors.weights import TensorInfo
from rkconvert.toolkit.tokenizer_files import stage_tokenizer
from rkruntime.bundle.manifest import GENERATION_CONFIG
from rkruntime.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SINGLE, _INDEX = MODEL_FILES.pairs[0]
_ADAPTER_FILE: Final = ADAPTER_FILES.pairs[0][0]
_DTYPES: Final = ("float32", "float16", "bfloat16")


def stage(model: MergedModel, template: ChatTemplate, release: ToolkitRelease, folder: Path, advance: Advance) -> None:
    """Fill `folder`, which may hold shards of a killed run. Weights are linked if they are the base's own files, else
    written.

    Args:
        advance: Called with the bytes of each block written.

    Raises:
        CheckpointError, AdapterError: Weights are NaN or infinite.
    """
    if is_linked(model):
        check_finite(model.weights, advance)
        _link_weights(model, folder)
    else:
        write_weights(folder, model.weights, advance)
    eos = model.checkpoint.eos_token_ids
    write_json(folder / CONFIG, config(model.hf_config(), model.weights.config, release, eos))
    bos = model.weights.config.bos_token_id
    stage_tokenizer(model.tokenizer_folder, bos, template, folder)
    ids = {"bos_token_id": bos, "eos_token_id": list(eos)}
    # No sampling settings: nothing is generated there, and transformers refuses a folder with one that it rejects.
    write_json(folder / GENERATION_CONFIG, ids)
    forget_shards(folder)


def is_linked(model: MergedModel) -> bool:
    """Whether the base's files contain this exact model, under names that transformers looks for, so that none need be
    written.
    """
    files = model.checkpoint.weight_files
    stored = model.checkpoint.weights
    # Other sources dequantize or rename what is in their files.
    plain = isinstance(stored, Renamed) and stored.as_stored
    own = plain and not model.weights.changed and model.weights.tensors == stored.tensors
    named = len(files) == 1 or (model.checkpoint.path / _INDEX).is_file()
    return own and named and all(file.suffix == ".safetensors" and _is_marked(file) for file in files)


def _is_marked(file: Path) -> bool:
    """Whether the file says that its tensors are PyTorch's; transformers 4 fails at one that does not."""
    return Shard(file, CheckpointError).metadata.get("format") == "pt"


def _link_weights(model: MergedModel, folder: Path) -> None:
    files = model.checkpoint.weight_files
    for file in files:
        link = folder / (file.name if len(files) > 1 else _SINGLE)
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    if len(files) > 1:
        index = read_json(model.checkpoint.path / _INDEX, CheckpointError)
        write_json(folder / _INDEX, {"metadata": {}, "weight_map": index["weight_map"]})


def stage_adapter(lora: SeparateLora, folder: Path) -> None:
    """Write an adapter into `folder`, below that of its base, as any release of peft reads it.

    Each release fails at keys of adapter_config.json that it does not know, and an exporter may take one rank and one
    alpha for all pairs, as a GGUF file has them.
    """
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder.parent.absolute()),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [name.removesuffix(".weight") for name in lora.pairs],
    }
    write_json(folder / ADAPTER_CONFIG, settings)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, (a, b) in lora.pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    plan = ShardPlan(_ADAPTER_FILE, {name: TensorInfo("F32", array.shape) for name, array in tensors.items()})
    with (folder / plan.name).open("wb") as file:
        file.write(plan.header())
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).data)


def config(
    raw: Mapping[str, Any], checked: GemmaConfig, release: ToolkitRelease, eos: tuple[int, ...]
) -> dict[str, Any]:
    """Return config.json for the toolkit: checked values only, in the types that transformers 5 insists on.

    transformers obeys many other keys, such as `attribute_map`, by which one name stands for another, and
    `attn_implementation`, which may name code to be loaded; what matters to training only is left to its defaults.
    The exporter needs numbers instead of null (airockchip/rknn-llm issue 148), chooses by the first architecture (issue
    220), and before 1.3.0 stores only one end token (CHANGELOG.md @ 1.3.0). transformers chooses by `model_type`.
    """
    family = FAMILIES[checked.family]
    pad, vocabulary = raw.get("pad_token_id"), checked.vocab_size
    settings: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "hidden_size": checked.hidden_size,
        "intermediate_size": checked.intermediate_size,
        "num_hidden_layers": checked.num_hidden_layers,
        "num_attention_heads": checked.num_attention_heads,
        "num_key_value_heads": checked.num_key_value_heads,
        "head_dim": checked.head_dim,
        "max_position_embeddings": checked.max_position_embeddings,
        "rms_norm_eps": checked.rms_norm_eps,
        "rope_theta": checked.rope_theta,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": checked.tie_word_embeddings,
        "bos_token_id": checked.bos_token_id,
        "eos_token_id": list(eos) if release.several_eos else eos[0],
        "pad_token_id": pad if type(pad) is int and 0 <= pad < vocabulary else 0,
        "attention_bias": False,
    }
    # transformers 5 writes the first; transformers 4 needs the second, which 5 reads too.
    dtype = raw.get("torch_dtype", raw.get("dtype"))
    if dtype in _DTYPES:
        settings["torch_dtype"] = dtype
    if "sliding_window" in family.defaults:
        settings |= _gemma2(raw, checked)
    return settings


def _gemma2(raw: Mapping[str, Any], checked: GemmaConfig) -> dict[str, Any]:
    """Return the settings that Gemma 1 does not have."""
    scalar = checked.query_pre_attn_scalar
    settings: dict[str, Any] = {
        # transformers 5 takes a whole number only.
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        # A window as long as the context has no effect.
        "sliding_window": checked.sliding_window or checked.max_position_embeddings,
        # If omitted, transformers fills in 50 and 30.
        "attn_logit_softcapping": checked.attn_logit_softcapping or None,
        "final_logit_softcapping": checked.final_logit_softcapping or None,
    }
    return settings | ({"layer_types": raw["layer_types"]} if raw.get("layer_types") else {})
