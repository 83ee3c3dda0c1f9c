"""What convert and merge begin with: the model, its adapters, and a text that names exactly this work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkconvert.adapter import Adapter, open_adapter
from rkconvert.adapter_notes import adapter_notes
from rkconvert.checkpoint import Checkpoint
from rkconvert.gemma import EMBEDDING
from rkconvert.hub import download, is_hub_id
from rkconvert.merge import MergedWeights
from rkconvert.updates import TensorUpdate, TokenRows
from rkruntime.bundle import TOKENIZER
from rkruntime.errors import AdapterError, UsageError


@dataclass(frozen=True)
class Lora:
    """An adapter on the command line: a folder or hub id, and the factor that its update is multiplied by."""

    source: str
    weight: float = 1.0

    @property
    def short_name(self) -> str:
        """The folder's name, or a hub id's without the owner."""
        return Path(self.source).resolve().name

    @classmethod
    def parse(cls, text: str) -> Lora:
        """`FOLDER` or `FOLDER=WEIGHT`; a folder of that whole name comes first. Raises UsageError for a bad weight."""
        source, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            return cls(text)
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"--lora {text}: {weight!r} is not a number.", hint="Write --lora FOLDER=0.5")
        return cls(source, number)


@dataclass(frozen=True)
class MergedModel:
    """A checkpoint with its adapters, checked; nothing is read but headers and adapters.

    Attributes:
        tokenizer_folder: where the tokenizer is: an adapter that made the vocabulary grow was saved with its own.
        notes: what a person must know of the adapters.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: MergedWeights
    tokenizer_folder: Path
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(info.nbytes for info in self.weights.tensors.values())

    @property
    def name(self) -> str:
        """The checkpoint's name, and the adapters'."""
        return "+".join([self.checkpoint.short_name, *(item.name.rpartition("/")[2] for item in self.adapters)])

    def hf_config(self) -> dict[str, Any]:
        """config.json of the merged model, without what described a quantized base."""
        merged = self.weights.config
        own = {"vocab_size": merged.vocab_size, "tie_word_embeddings": merged.tie_word_embeddings}
        return {key: value for key, value in self.checkpoint.raw_config.items() if key != "quantization_config"} | own

    def job(self, **options: Any) -> str:
        """A text that is the same for the same files and options, for `work_folder`."""
        files = [*self.checkpoint.weight_files, *(file for adapter in self.adapters for file in adapter.weight_files)]
        return json.dumps({"files": _states(files), **options}, sort_keys=True, default=str)


def _states(files: Iterable[Path]) -> list[list[str | int]]:
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def merged_model(base: Checkpoint, loras: Sequence[Lora]) -> MergedModel:
    """Open adapters and put them on a checkpoint. Raises AdapterError if one cannot be used, or does not fit."""
    adapters = tuple(_open_adapter(lora, base) for lora in loras)
    for adapter in adapters:
        changes = adapter.updates.get(EMBEDDING, TensorUpdate()).changes
        if base.own_head and any(isinstance(change, TokenRows) for change in changes):
            raise AdapterError(
                f"{adapter.name} has trained tokens in the embedding, to which {base.name} ties its head, while it"
                " stores another: peft changes both sides, and a model with two sides has one of them changed.",
                hint="Make the model's config.json and files agree, and train on that: tie_word_embeddings false, or no"
                " lm_head.weight.",
            )
    weights = MergedWeights(base.weights, base.config, adapters)
    size = weights.config.vocab_size
    if size < base.config.vocab_size and max(base.eos_token_ids) >= size:
        raise AdapterError(
            f"The adapters leave {size:,} tokens, and answers end with the token {max(base.eos_token_ids)}."
        )
    own = [adapter.path for adapter in adapters if adapter.own_tokens and (adapter.path / TOKENIZER).is_file()]
    notes = [note for adapter in adapters for note in adapter_notes(adapter, base)]
    return MergedModel(base, adapters, weights, own[0] if own else base.path, (*notes, *weights.notes))


def _open_adapter(lora: Lora, base: Checkpoint) -> Adapter:
    path = Path(lora.source)
    if path.exists() or not is_hub_id(lora.source):
        return open_adapter(path, base.config.tensors(), lora.weight)
    folder, commit = download(lora.source, weights="adapter_model")
    return open_adapter(folder, base.config.tensors(), lora.weight, lora.source, commit)
