"""Where a plan's config.json comes from: a folder, the file itself, or the Hugging Face hub. No weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rkconvert.checkpoint import CONFIG
from rkconvert.shards import read_json
from rkconvert.tensor_files import INDEX
from rkruntime.errors import CheckpointError, HostError

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """What is known of a model without its weights.

    Attributes:
        stored_bytes: size of its weight files, by the index or the files; None if neither is there.
    """

    name: str
    config: Mapping[str, Any]
    stored_bytes: int | None = None
    notes: tuple[str, ...] = field(default=())


def read_source(model: str, revision: str | None = None) -> ModelSource:
    """Find config.json and, where there is one, the index.

    Raises:
        CheckpointError: there is no such model, or its files are not what they should be.
        HostError: the hub cannot be reached, or huggingface_hub is not installed.
    """
    path = Path(model)
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if path.is_file():
        return _source(path.resolve().parent.name or path.stem, path, None, None)
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        return _from_hub(model, revision)
    raise CheckpointError(
        f"There is no folder or file {model}.",
        hint="Give a folder with config.json, a config.json, or a hub id such as google/gemma-2-2b-it.",
    )


def _from_folder(folder: Path, name: str) -> ModelSource:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}.")
    index = folder / INDEX
    shards = list(folder.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards) if shards else None
    return _source(name, folder / CONFIG, index if index.is_file() else None, size)


def _source(name: str, config_path: Path, index_path: Path | None, file_bytes: int | None) -> ModelSource:
    config = read_json(config_path, CheckpointError)
    stored = file_bytes
    if index_path is not None:
        metadata = read_json(index_path, CheckpointError).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        stored = int(total) if isinstance(total, int | float) and total > 0 else file_bytes
    notes: tuple[str, ...] = ()
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "some method") if isinstance(method, Mapping) else "some method"
        notes = (f"the checkpoint is quantized already ({method}); what it has lost stays lost",)
    return ModelSource(name, config, stored, notes)


def _from_hub(model: str, revision: str | None) -> ModelSource:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise HostError(
            f"There is no folder {model}, and to look it up on the hub huggingface_hub is missing.",
            hint="pip install 'rkedge[convert]', or download its config.json and give that.",
        ) from error
    try:
        config = Path(hf_hub_download(model, CONFIG, revision=revision))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: its owner asks you to accept a licence first.",
            hint=f"Open https://huggingface.co/{model}, accept, then run `hf auth login`.",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, RepositoryNotFoundError | EntryNotFoundError) and not isinstance(
            error, LocalEntryNotFoundError
        ):
            raise CheckpointError(f"The hub has no {model} with a {CONFIG}.", hint="Check the spelling.") from error
        raise HostError(
            f"There is no folder {model}, and its {CONFIG} cannot be fetched from the hub: {_first_line(error)}",
            hint="Check the network, or download its config.json on another machine and give that.",
        ) from error
    try:
        index = Path(hf_hub_download(model, INDEX, revision=revision))
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return _source(model.split("/")[1], config, None, None)
    return _source(model.split("/")[1], config, index, None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
