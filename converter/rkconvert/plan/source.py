"""Read a plan's config.json from a folder, the file itself or the Hugging Face hub. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rkconvert.sources.bitsandbytes import is_bitsandbytes
from rkconvert.sources.checkpoint import CONFIG, NAMED_WEIGHTS, find_config, read_config, refuse_other_weights
from rkconvert.sources.hub import hub_file, is_hub_id, refuse_revision
from rkconvert.tensors.shards import read_json
from rkconvert.tensors.tensor_files import INDEX, MODEL_FILES, find_files
from rkruntime.errors import CheckpointError
from rkruntime.files import read_error, readable

# No model has so many; an index that says so is wrong.
_MOST_BYTES: Final = 1 << 50
_WHAT_TO_NAME: Final = "Name a folder with config.json, a config.json, or a hub id such as google/gemma-2-2b-it."


@dataclass(frozen=True)
class ModelSource:
    """What is known about a model without its weights.

    Attributes:
        stored_bytes: Size of its weight files, from the index or the files; None if neither exists.
    """

    name: str
    config: Mapping[str, Any]
    stored_bytes: int | None = None
    notes: tuple[str, ...] = field(default=())


def read_source(model: str, revision: str | None = None) -> ModelSource:
    """Find config.json and, if there is one, the index.

    Raises:
        CheckpointError: There is no such model, or its files are invalid.
        HostError: See `hub_file`.
    """
    path = Path(model)
    refuse_revision(model, revision)
    try:
        if path.is_dir():
            return _from_folder(path, path.resolve().name)
        if path.is_file():
            return _from_file(path)
    except OSError as error:
        raise read_error(path, error, CheckpointError) from error
    if is_hub_id(model):
        return _from_hub(model, revision)
    raise CheckpointError(f"There is no folder or file {model}.", hint=_WHAT_TO_NAME)


def _from_folder(folder: Path, name: str) -> ModelSource:
    config, index = find_config(folder), folder / INDEX
    shards = list(folder.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards) if shards else None
    source = _source(name, config, index if index.is_file() else None, size)
    if shards and source.config.get(NAMED_WEIGHTS) is not None:
        refuse_other_weights(folder, source.config, find_files(folder, MODEL_FILES, CheckpointError)[0])
    return source


def _from_file(path: Path) -> ModelSource:
    config = {} if path.suffix != ".json" else read_json(path, CheckpointError)
    if not config.keys() & {"model_type", "architectures"}:
        inside = path.name != CONFIG and (path.parent / CONFIG).is_file()
        raise CheckpointError(
            f"{path} is not a config.json: it names neither a model_type nor an architecture.",
            hint=f"Name the folder that it is in: {path.parent}" if inside else _WHAT_TO_NAME,
        )
    return _source(path.resolve().parent.name or path.stem, path, None, None)


def _source(name: str, config_path: Path, index_path: Path | None, file_bytes: int | None) -> ModelSource:
    config = read_config(config_path)
    stored = file_bytes
    if index_path is not None:
        metadata = read_json(index_path, CheckpointError).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        if isinstance(total, int | float) and not isinstance(total, bool) and 0 < total < _MOST_BYTES:
            stored = int(total)
    notes: tuple[str, ...] = ()
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "bitsandbytes") if isinstance(method, Mapping) else "some method"
        refused = (
            "" if is_bitsandbytes(config) else ", and `rkedge convert` refuses it; start from the 16-bit checkpoint"
        )
        notes = (f"the checkpoint is already quantized ({method}), and its lost precision does not come back{refused}",)
    return ModelSource(readable(name), config, stored, notes)


def _from_hub(model: str, revision: str | None) -> ModelSource:
    config = hub_file(model, CONFIG, revision)
    if config is None:
        raise CheckpointError(f"{model} on the hub has no {CONFIG}.")
    return _source(model.split("/")[1], config, hub_file(model, INDEX, revision), None)
