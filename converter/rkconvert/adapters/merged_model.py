"""What convert and merge begin with: the model, its adapters, and a key that identifies exactly this work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.merge import MergedWeights
from rkconvert.adapters.notes import adapter_notes, token_count
from rkconvert.adapters.reader import Adapter, open_adapter
from rkconvert.adapters.updates import TensorUpdate, TokenRows
from rkconvert.model.added_tokens import tokenizer_config
from rkconvert.model.family import EMBEDDING
from rkconvert.sources.checkpoint import ADAPTER_CONFIG, NAMED_WEIGHTS, Checkpoint
from rkconvert.sources.hub import download, is_hub_id
from rkconvert.tensors.inputs import Inputs, folder_states
from rkconvert.tensors.memory_folder import Place
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.errors import AdapterError, UsageError
from rkruntime.files import readable

# Version of `resume_key` and of an unfinished folder's contents: increment it when the meaning of either changes.
KEY_FORMAT: Final = 3


@dataclass(frozen=True)
class AdapterSource:
    """An adapter on the command line: a folder or hub id, and the factor for its update."""

    source: str
    weight: float = 1.0

    @property
    def short_name(self) -> str:
        """The folder's name, or a hub id's without the owner."""
        return Path(self.source).resolve().name

    @classmethod
    def parse(cls, text: str) -> AdapterSource:
        """Parse `FOLDER` or `FOLDER=WEIGHT`; a folder with the whole name wins. Raises UsageError for a bad weight."""
        source, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            return cls(text)
        try:
            # Python's float reads 1_0 as 10.
            number = math.nan if "_" in weight else float(weight)
        except ValueError:
            number = math.nan
        if not source:
            raise UsageError(f"--lora {text}: it names no folder.", hint="Write --lora FOLDER=0.5")
        if not math.isfinite(number):
            raise UsageError(f"--lora {text}: {weight!r} is not a number.", hint="Write --lora FOLDER=0.5")
        return cls(source, number)


@dataclass(frozen=True)
class MergedModel:
    """A checkpoint with its adapters, checked; only headers and adapters are read.

    Attributes:
        inputs: State of the files of the checkpoint and each adapter, taken before they were read.
        tokenizer_folder: Folder with the tokenizer: an adapter that changes the embeddings was saved with its own.
        notes: Notes for the user on the adapters.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    inputs: tuple[Inputs, ...]
    weights: MergedWeights
    tokenizer_folder: Place
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of all weights, in bytes."""
        return sum(info.nbytes for info in self.weights.tensors.values())

    @property
    def name(self) -> str:
        """The names of the checkpoint and the adapters."""
        return "+".join([self.checkpoint.short_name, *(item.name.rpartition("/")[2] for item in self.adapters)])

    def hf_config(self) -> dict[str, Any]:
        """Return config.json of the merged model, without what describes the base's files and their numbers."""
        merged = self.weights.config
        own = {"vocab_size": merged.vocab_size, "tie_word_embeddings": merged.tie_word_embeddings}
        dropped = ("quantization_config", NAMED_WEIGHTS)
        return {key: value for key, value in self.checkpoint.raw_config.items() if key not in dropped} | own


def resume_key(inputs: Iterable[Inputs], **options: Any) -> str:
    """Return a text that determines the result, for `work_folder`: if it differs, nothing of an earlier run is kept.

    It holds the states of weight files, the hashes of small files, every option, and library versions.
    """
    makers = {name: _installed(name) for name in ("rkedge", "numpy", "gguf")}
    files = [item.identity() for item in inputs]
    return json.dumps({"format": KEY_FORMAT, "makers": makers, "files": files, **options}, sort_keys=True, default=str)


def _installed(package: str) -> str:
    """Return the package's version; empty if it is not installed."""
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def merged_model(base: Checkpoint, loras: Sequence[AdapterSource]) -> MergedModel:
    """Open adapters and apply them to a checkpoint.

    Raises:
        AdapterError: One cannot be used or does not fit, or the checkpoint's own folder has another one.
    """
    opened = [_open_adapter(lora, base) for lora in loras]
    _refuse_forgotten_adapter(base, [adapter for adapter, _ in opened])
    return _merged(base, opened)


def bare_model(base: Checkpoint) -> MergedModel:
    """Return a checkpoint without adapters, for one that becomes a file of its own."""
    return _merged(base, ())


def _merged(base: Checkpoint, opened: Sequence[tuple[Adapter, Inputs]]) -> MergedModel:
    adapters = tuple(adapter for adapter, _ in opened)
    for adapter in adapters:
        changes = adapter.updates.get(EMBEDDING, TensorUpdate()).changes
        if base.own_head and any(isinstance(change, TokenRows) for change in changes):
            raise AdapterError(
                f"{adapter.name} has trained tokens in the embedding. {base.name} ties its head to it, but also stores"
                " another head: peft changes both sides, but in a model with two sides only one of them changes.",
                hint="Make the model's config.json and files agree, and train on that: tie_word_embeddings false, or no"
                " lm_head.weight.",
            )
    weights = MergedWeights(base.weights, base.config, adapters)
    size = weights.config.vocab_size
    if size < base.config.vocab_size and max(base.eos_token_ids) >= size:
        raise AdapterError(
            f"The adapters leave {size:,} tokens, but answers end with the token {max(base.eos_token_ids)}."
        )
    tokenizer = _tokenizer_folder(base, adapters, size)
    tokenizer_config(tokenizer)  # A tokenizer in a file of another name is refused: nothing here would read or copy it.
    inputs = (base.inputs, *(files for _, files in opened))
    notes = [note for adapter in adapters for note in adapter_notes(adapter, base, tokenizer, size)]
    return MergedModel(base, adapters, inputs, weights, tokenizer, (*notes, *weights.notes))


def _refuse_forgotten_adapter(base: Checkpoint, adapters: Iterable[Adapter]) -> None:
    """Raise AdapterError for a model with an adapter in its own folder that is not one of these."""
    folder = Path(str(base.path)).resolve()
    if (base.path / ADAPTER_CONFIG).is_file() and all(adapter.path.resolve() != folder for adapter in adapters):
        raise AdapterError(
            f"{base.path} contains a LoRA adapter besides the model, which transformers applies to its base.",
            hint=f"Merge it with --lora {base.path}; or move {ADAPTER_CONFIG} away, to use the model without it.",
        )


def _tokenizer_folder(base: Checkpoint, adapters: Iterable[Adapter], size: int) -> Place:
    """Choose the tokenizer of the first adapter that changes the embeddings and fits `size` rows, else the base's.

    Raises:
        AdapterError: An adapter's rows match neither the base's vocabulary nor that of its own tokenizer.
    """
    for adapter in adapters:
        if adapter.own_tokens and (adapter.path / TOKENIZER).is_file():
            count = token_count(adapter.path / TOKENIZER)
            if count <= size:
                return adapter.path
            if size != base.config.vocab_size:
                raise AdapterError(
                    f"{adapter.name} has a tokenizer of {count:,} tokens, but its embeddings have {size:,} rows.",
                    hint="One of the two is from another training run: use those that were saved together.",
                )
    return base.path


def _open_adapter(lora: AdapterSource, base: Checkpoint) -> tuple[Adapter, Inputs]:
    folder, commit = Path(lora.source), ""
    name = readable(folder.resolve().name)
    if not folder.exists() and is_hub_id(lora.source):
        name = lora.source
        folder, commit = download(name, weights="adapter_model")
    before = folder_states(folder)
    adapter = open_adapter(folder, base.config.tensors(), lora.weight, name, commit)
    return adapter, Inputs.of_folder(AdapterError, folder, before, adapter.weight_files)
