"""A GGUF file of Gemma 1 or 2 as a checkpoint: settings and tokenizer from its header, weights dequantized as read.

The `gguf` package dequantizes. llama.cpp's converter adds 1 to every norm of Gemma, which is subtracted again here
(convert_hf_to_gguf.py, Gemma2Model.modify_tensors).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.model.families import FAMILIES
from rkconvert.model.gemma import parse_config
from rkconvert.sources.checkpoint import Checkpoint, check_weights
from rkconvert.sources.gguf_file import GgufFile, GgufTensor, part_paths, read_gguf, read_parts
from rkconvert.sources.gguf_tokenizer import tokenizer_json
from rkconvert.tensors.formats import to_float32
from rkconvert.tensors.inputs import Inputs, states_of
from rkconvert.tensors.memory_folder import MemoryFolder
from rkconvert.tensors.shards import Entry, RowReader
from rkconvert.tensors.weights import TensorInfo
from rkruntime.errors import CheckpointError, HostError
from rkruntime.files import readable
from rkruntime.packages import install

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROPE_FREQS: Final = "rope_freqs.weight"
_PART: Final = re.compile(r"-00001-of-\d{5}$")
# ggml's types of plain numbers; all others are dequantized to float32.
_PLAIN: Final = {0: "F32", 1: "F16", 30: "BF16"}
# Layers of the 27B model, by which llama.cpp recognizes it: it scales that model's queries by hidden size / heads.
_LAYERS_27B: Final = 46


def open_gguf(path: Path) -> Checkpoint:
    """Open a .gguf file, or the first part of a split model.

    Raises:
        CheckpointError: Not a GGUF file, damaged, of another architecture, or parts are missing.
        HostError: The gguf package is missing.
    """
    paths = part_paths(path, read_gguf(path).metadata)
    inputs = Inputs(CheckpointError, states_of(paths), {})
    # A change to any part is noticed from here on.
    files = read_parts(read_gguf(path), paths)
    file = replace(files[0], tensors={name: tensor for part in files for name, tensor in part.tensors.items()})
    family = str(file.metadata.get("general.architecture"))
    if family not in FAMILIES:
        raise CheckpointError(
            f"{path} has the architecture {family[:80]!r}; supported are {', '.join(FAMILIES)}.",
            hint="Convert a Gemma 2 (or Gemma 1) text model.",
        )
    if file.metadata.get("general.type") == "adapter":
        raise CheckpointError(
            f"{path} is an adapter, not a model.",
            hint="Name its base model; --lora takes the adapter as peft wrote it, a folder, and not as GGUF.",
        )
    raw = _config(file, family)
    config = parse_config(raw)
    weights = GgufWeights(files, family)
    check_weights(weights, config)
    return Checkpoint(
        path=MemoryFolder(path, _side_files(file, raw)),
        config=config,
        raw_config=raw,
        weights=weights,
        inputs=inputs,
        name=readable(_PART.sub("", path.stem)),
        notes=weights.notes(),
        libraries={"gguf": version("gguf")},
    )


class GgufWeights:
    """A GGUF model's tensors, from all its files, by their Hugging Face names."""

    def __init__(self, files: Sequence[GgufFile], family: str) -> None:
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
        except ImportError as error:
            raise HostError(f"Reading {files[0].path} needs the gguf package.", hint=install("gguf")) from error
        self._dequantize, self._types = quants.dequantize, GGMLQuantizationType
        self._places: dict[str, tuple[GgufTensor, Entry, RowReader]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        # Numbers in a block and its bytes, by type.
        self._sizes: dict[int, tuple[int, int]] = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for file in files:
            self._add(file, family)

    def _add(self, file: GgufFile, family: str) -> None:
        rows = RowReader(file.path, CheckpointError)
        entries: dict[str, Entry] = {}
        for own_name, tensor in file.tensors.items():
            if own_name == _ROPE_FREQS:
                continue
            # Tensors that the family does not have keep their names, by which they are refused later.
            name = FAMILIES[family].from_gguf(own_name) or own_name
            if tensor.kind not in self._sizes:
                raise CheckpointError(
                    f"{own_name} in {file.path} has the type {tensor.kind}, which is unknown to gguf."
                )
            if tensor.kind not in _PLAIN:
                # A type that cannot be dequantized is refused now, not in the middle of the work.
                self._floats(tensor, np.zeros((1, self._sizes[tensor.kind][1]), np.uint8))
            entries[name] = Entry(_stored(file, own_name, *self._sizes[tensor.kind]), tensor.offset)
            self._places[name] = (tensor, entries[name], rows)
            plain = _PLAIN.get(tensor.kind, "F32")
            self.tensors[name] = TensorInfo("F32" if _is_norm(name) else plain, tensor.shape)
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            if entry.offset < end:
                raise CheckpointError(f"{file.path} is damaged: the tensor {name} overlaps another one.")
            end = entry.offset + entry.info.nbytes

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows of a tensor, dequantized, with norms as Hugging Face stores them."""
        tensor, entry, file = self._places[name]
        self.tensors[name].require_rows(first, count, name)
        if _is_norm(name):
            # Rows of a vector are single numbers, so a quantized type's blocks cannot apply.
            whole = file.rows(entry, 0, entry.info.shape[0])
            floats = to_float32(whole, _PLAIN[tensor.kind]) if tensor.kind in _PLAIN else self._floats(tensor, whole)
            norm: NDArray[np.float32] = floats[first : first + count] - np.float32(1)
            return norm
        stored = file.rows(entry, first, count)
        return stored if tensor.kind in _PLAIN else self._floats(tensor, stored)

    def _floats(self, tensor: GgufTensor, stored: NDArray[Any]) -> NDArray[np.float32]:
        try:
            # What is not finite is refused where the numbers are used.
            with np.errstate(all="ignore"):
                values: NDArray[np.float32] = self._dequantize(stored, self._types(tensor.kind))
        except NotImplementedError as error:  # Raised by the gguf package for a type that it knows only by name.
            kind = self._types(tensor.kind).name
            raise CheckpointError(
                f"The gguf package cannot dequantize {kind}.", hint="Use a GGUF of another type."
            ) from error
        return values

    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on the types in the file."""
        kinds = {tensor.kind for tensor, *_ in self._places.values() if len(tensor.shape) > 1}
        low = sorted(self._types(kind).name for kind in kinds if _bits(*self._sizes[kind]) < 8)
        if not low:
            return ()
        return (f"the source is stored as {', '.join(low)}: the precision lost there does not come back with w8a8",)


def _stored(file: GgufFile, name: str, block: int, size: int) -> TensorInfo:
    """Return the layout of a tensor in the file, whose type packs `block` numbers into `size` bytes."""
    tensor = file.tensors[name]
    if tensor.shape[-1] % block:
        raise CheckpointError(
            f"{name} in {file.path} has rows of {tensor.shape[-1]} numbers, which are not whole blocks."
        )
    dtype = _PLAIN.get(tensor.kind)
    packed = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
    stored = TensorInfo(dtype, tensor.shape) if dtype else TensorInfo("U8", packed)
    end = tensor.offset + stored.nbytes
    if end > file.size:
        raise CheckpointError(f"{file.path} is cut: {name} ends at byte {end:,}, the file at {file.size:,}.")
    return stored


def _bits(block: int, size: int) -> float:
    """Return the bits per number, with its share of the block's scales."""
    return 8 * size / block


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _refuse_other_computations(file: GgufFile, family: str) -> None:
    """Raise CheckpointError for features of a file that Gemma 1 and 2 do not have.

    The keys are those that llama.cpp reads for these two, but `_config` does not
    (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp, load_hparams; src/models/gemma2.cpp).
    """
    known = file.metadata
    head, base = known.get(f"{family}.attention.key_length"), known.get(f"{family}.rope.freq_base", 10000.0)
    # The values with which each key changes nothing.
    idle: dict[str, tuple[Any, ...]] = {
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (0.0, 1.0),
        "rope.scale_linear": (0.0, 1.0),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.alpha": (0.0,),
        "rope.freq_base_swa": (base,),
        "rope.dimension_count": (head,),
        "rope.dimension_count_swa": (head,),
        "attention.key_length_swa": (head,),
        "attention.value_length": (head,),
        "attention.value_length_swa": (head,),
        "attention.causal": (True,),
        "attention.sliding_window_pattern": (2,),
        "attention.scale": (),
        "attention.max_alibi_bias": (0.0,),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "expert_group_count": (0,),
        "expert_group_used_count": (0,),
    }
    for name, values in idle.items():
        key = f"{family}.{name}"
        if key in known and known[key] not in values:
            raise CheckpointError(
                f"{file.path}: {key} is {str(known[key])[:80]}, which Gemma 1 and 2 do not have.",
                hint="Use a GGUF of the complete, unmodified model, or its checkpoint.",
            )
    if _ROPE_FREQS in file.tensors:
        raise CheckpointError(
            f"{file.path} scales its rotary embeddings ({_ROPE_FREQS}), which Gemma 1 and 2 do not.",
            hint="Convert the checkpoint that the GGUF was made from.",
        )


def _config(file: GgufFile, family: str) -> dict[str, Any]:
    """Return config.json of the original model, as far as the file describes it."""
    _refuse_other_computations(file, family)

    def value(key: str, default: Any = None) -> Any:
        found = file.metadata.get(f"{family}.{key}", default)
        if found is None:
            raise CheckpointError(f"{file.path} lacks {family}.{key}, without which the model cannot be computed.")
        return found

    heads, hidden, layers = value("attention.head_count"), value("embedding_length"), value("block_count")
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        raise CheckpointError(f"{file.path} has {str(heads)[:40]} heads for a width of {str(hidden)[:40]}.")
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": len(_tokens(file)),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": _decimal(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(value("rope.freq_base", 10000.0)),
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": _ends_of_answers(file),
        "dtype": "float32",
    }
    if "sliding_window" in FAMILIES[family].defaults:
        config |= {
            "sliding_window": value("attention.sliding_window", 4096),
            "attn_logit_softcapping": _decimal(value("attn_logit_softcapping", 50.0)),
            "final_logit_softcapping": _decimal(value("final_logit_softcapping", 30.0)),
            "query_pre_attn_scalar": hidden // heads if layers == _LAYERS_27B else config["head_dim"],
        }
    return config


def _ends_of_answers(file: GgufFile) -> list[Any]:
    """Return the ids at which llama.cpp ends an answer, including those that end a turn."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [file.metadata[key] for name in names if (key := f"tokenizer.ggml.{name}") in file.metadata]
    return found or [1]


def _decimal(value: Any) -> Any:
    """Return the shortest decimal that gives this float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tokens(file: GgufFile) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{file.path} contains no tokenizer.", hint="Use a GGUF of the whole model.")
    return tokens


def _side_files(file: GgufFile, config: Mapping[str, Any]) -> dict[str, bytes]:
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "tokenizer.json": json.dumps(tokenizer_json(file), ensure_ascii=False).encode(),
    }
    template = file.metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template.encode()} if isinstance(template, str) else {})
