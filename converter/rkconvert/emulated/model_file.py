"""Write model.rkemu from a model's weights, quantized in blocks of rows: never a whole matrix in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkconvert.emulated.quantize import group_size, quantize_rows
from rkconvert.model.families import FAMILIES
from rkconvert.model.gemma import GemmaConfig
from rkconvert.progress import Advance
from rkconvert.target import ModelSpec
from rkconvert.tensors.formats import STORAGE, to_float32
from rkconvert.tensors.processes import in_processes
from rkconvert.tensors.weights import read_finite, row_blocks
from rkruntime.bundle import rkemu
from rkruntime.errors import ModelFileError
from rkruntime.text.template import END_OF_TURN

if TYPE_CHECKING:
    from numpy.typing import NDArray


def metadata(spec: ModelSpec) -> dict[str, rkemu.Value]:
    """Return the container's keys and values, as in docs/rkemu-format.md."""
    config = spec.config
    return {
        "general.kind": "model",
        "general.architecture": config.family,
        "general.name": spec.model.name,
        "rkllm.target_platform": spec.platform.upper(),
        "rkllm.model_dtype": spec.dtype.upper(),
        "rkllm.toolkit_version": spec.release,
        "rkllm.max_context": spec.max_context,
        "rkllm.npu_core_num": spec.npu_cores,
        "rkllm.chat_template.system": "",
        "rkllm.chat_template.prefix": spec.template.prefix,
        "rkllm.chat_template.suffix": spec.template.suffix,
        **_config_keys(config),
        "tokenizer.bos_token_id": config.bos_token_id,
        "tokenizer.unk_token_id": spec.tokenizer.unk_token_id,
        "tokenizer.add_bos": 1,
        "tokenizer.eos_token_ids": _ends_of_answers(spec),
    }


def _config_keys(config: GemmaConfig) -> dict[str, rkemu.Value]:
    return {
        "model.vocab_size": config.vocab_size,
        "model.hidden_size": config.hidden_size,
        "model.intermediate_size": config.intermediate_size,
        "model.num_hidden_layers": config.num_hidden_layers,
        "model.num_attention_heads": config.num_attention_heads,
        "model.num_key_value_heads": config.num_key_value_heads,
        "model.head_dim": config.head_dim,
        "model.sliding_window": config.sliding_window,
        "model.layer_types": [int(sliding) for sliding in config.sliding_layers],
        "model.rms_norm_eps": config.rms_norm_eps,
        "model.rope_theta": config.rope_theta,
        "model.query_pre_attn_scalar": config.query_pre_attn_scalar,
        "model.attn_logit_softcapping": config.attn_logit_softcapping,
        "model.final_logit_softcapping": config.final_logit_softcapping,
    }


def _ends_of_answers(spec: ModelSpec) -> list[int]:
    """Put the end of a turn first: runtimes before 1.3.0 know only one id, and a chat needs this one."""
    ids = list(spec.model.checkpoint.eos_token_ids)
    end_of_turn = spec.tokenizer.added.get(END_OF_TURN)
    return sorted(ids, key=lambda token: token != end_of_turn)


def _specs(config: GemmaConfig, dtype: str) -> Iterator[rkemu.TensorSpec]:
    for name, shape in config.tensors().items():
        target = FAMILIES[config.family].to_rkemu(name)
        if len(shape) == 1 or dtype == "fp32":
            yield rkemu.TensorSpec(target, "float32", shape)
        else:
            yield rkemu.TensorSpec(target, "int8", shape)
            yield rkemu.TensorSpec(f"{target}.scale", "float32", (shape[0], shape[1] // group_size(dtype, shape[1])))


def tensor_specs(spec: ModelSpec) -> Sequence[rkemu.TensorSpec]:
    """Return the container's directory. Raises RefusedError if the type's group size does not divide a row."""
    tables = [rkemu.TensorSpec(name, array.dtype.name, array.shape) for name, array in spec.tokenizer.arrays.items()]
    return [*_specs(spec.config, spec.dtype), *tables]


def write_sizes_only(path: Path, config: GemmaConfig, dtype: str, max_context: int, cores: int) -> None:
    """Write a file that occupies the emulator's NPU memory like the model, but has no weights: it cannot be run.

    Raises:
        RefusedError: The type's group size does not divide a row.
    """
    metadata = {
        "general.kind": "model",
        "general.architecture": config.family,
        "rkllm.target_platform": "RK3588",
        "rkllm.model_dtype": dtype.upper(),
        "rkllm.max_context": max_context,
        "rkllm.npu_core_num": cores,
        **_config_keys(config),
    }
    with rkemu.Writer(path, metadata, list(_specs(config, dtype)), sizes_only=True):
        pass


def write_emulator_file(path: Path, spec: ModelSpec, advance: Advance) -> None:
    """Write model.rkemu; `advance` gets the bytes of each block read.

    Raises:
        CheckpointError, AdapterError: Weights are NaN or infinite.
        ModelFileError: The file, read back, differs from what was written.
    """
    with rkemu.Writer(path, metadata(spec), tensor_specs(spec)) as writer:

        def write(name: str, step: Advance) -> dict[str, int]:
            return _write_tensor(writer, name, spec, step)

        with closing(in_processes(write, list(spec.config.tensors()), advance, spec.model.nbytes)) as written:
            for _, checksums in written:
                writer.written(checksums)
        for name, array in spec.tokenizer.arrays.items():
            writer.write(name, array)
    _read_back(path, spec)


def _read_back(path: Path, spec: ModelSpec) -> None:
    """Verify the file on disk: sizes, and checksums of the header, metadata and directory."""
    found = rkemu.read_container(path)
    directory = {name: entry.spec for name, entry in found.tensors.items()}
    if (
        directory != {tensor.name: tensor for tensor in tensor_specs(spec)}
        or found.metadata.keys() != metadata(spec).keys()
    ):
        raise ModelFileError(f"{path} differs from what was written to it: the disk or the memory is faulty.")


def _write_tensor(writer: rkemu.Writer, name: str, spec: ModelSpec, step: Advance) -> dict[str, int]:
    """Write a tensor, with its scales if it is quantized; returns the checksums."""
    weights = spec.model.weights
    info, target = weights.tensors[name], FAMILIES[spec.config.family].to_rkemu(name)
    plain = len(info.shape) == 1 or spec.dtype == "fp32"
    group = 0 if plain else group_size(spec.dtype, info.shape[1])
    targets = [target] if plain else [target, f"{target}.scale"]
    for first, count in row_blocks(info.shape):
        rows = to_float32(read_finite(weights, name, first, count), info.dtype)
        parts: tuple[NDArray[Any], ...] = (rows,) if plain else quantize_rows(rows, group)
        for part, array in zip(targets, parts, strict=True):
            writer.write_rows(part, first, array)
        step(rows.size * STORAGE[info.dtype].itemsize)
    return writer.checksums(targets)
