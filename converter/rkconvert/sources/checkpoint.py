"""A model folder in Hugging Face layout: config.json, tokenizer.json and safetensors, checked before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from rkconvert.model.family import EMBEDDING, HEAD
from rkconvert.model.gemma import GemmaConfig, parse_config, token_ids
from rkconvert.sources.bitsandbytes import Dequantized, is_bitsandbytes
from rkconvert.sources.names import Renamed
from rkconvert.tensors.formats import FLOATS
from rkconvert.tensors.inputs import Inputs, folder_states
from rkconvert.tensors.memory_folder import Place
from rkconvert.tensors.shards import read_json, refuse_versions
from rkconvert.tensors.tensor_files import INDEX, MODEL_FILES, open_tensor_files
from rkconvert.tensors.weights import Weights, same_values
from rkruntime.bundle.manifest import MANIFEST
from rkruntime.errors import CheckpointError
from rkruntime.files import read_error, readable
from rkruntime.words import counted

CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
# Setting of transformers 5 for the name of a weight file or index that is loaded in place of the usual ones.
NAMED_WEIGHTS: Final = "transformers_weights"
_WHAT_TO_NAME: Final = "Name a folder in Hugging Face layout, a .gguf file, or a hub id such as google/gemma-2-2b-it."
_OWN_HEAD: Final = (
    "config.json ties the head to the embedding, but the files contain a head that differs from it: that head is kept,"
    " as in transformers 5 (transformers 4 drops it)"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checked model.

    Attributes:
        path: Folder of config.json, tokenizer and template; for a GGUF file it exists only in memory.
        config: Settings; `raw_config` is config.json unchanged.
        weights: Every tensor of the model as floats, with the right name and shape.
        inputs: State of its files, taken before they were read.
        name: Name for messages: the folder's name, or the hub id.
        revision: Commit of a hub model.
        notes: Notes for the user.
        own_head: Whether a stored head is kept although config.json ties the head to the embedding.
        libraries: Releases of packages that compute what is read from its files.
    """

    path: Place
    config: GemmaConfig
    raw_config: Mapping[str, Any]
    weights: Weights
    inputs: Inputs
    name: str
    revision: str = ""
    notes: tuple[str, ...] = ()
    own_head: bool = False
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files with the weights."""
        return tuple(self.inputs.weights)

    @property
    def short_name(self) -> str:
        """Name without a hub id's owner."""
        return self.name.rpartition("/")[2]

    @property
    def nbytes(self) -> int:
        """Size of all weights, in bytes."""
        return sum(info.nbytes for info in self.weights.tensors.values())

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, empty if there is none."""
        path = self.path / "generation_config.json"
        return read_json(path, CheckpointError) if path.is_file() else {}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those of generation_config.json, else of config.json."""
        value = self.generation_config.get("eos_token_id")
        if value is None:
            return self.config.eos_token_ids
        return token_ids("eos_token_id", value, self.config.vocab_size, "generation_config.json")


def open_checkpoint(path: Path, name: str | None = None, revision: str = "") -> Checkpoint:
    """Open a folder and check that it is a complete Gemma model. Weights are read only to compare a stored head with
    the embedding that config.json ties it to.

    Raises:
        CheckpointError: With a message for each possible defect.
    """
    before = folder_states(path)
    raw = read_config(find_config(path))
    config = parse_config(raw)
    files, found = open_tensor_files(path, MODEL_FILES, CheckpointError)
    refuse_other_weights(path, raw, files)
    weights: Weights = Renamed(found)
    notes: tuple[str, ...] = ()
    if is_bitsandbytes(raw):
        weights = Dequantized(weights, raw)
        notes = ("the source was quantized by bitsandbytes: the lost precision does not come back",)
    elif quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"The checkpoint is already quantized by {str(method)[:80]}.",
            hint="Start from the original 16-bit checkpoint.",
        )
    check_weights(weights, config)
    own_head = config.tie_word_embeddings and _has_own_head(weights)
    if own_head:
        config, raw = replace(config, tie_word_embeddings=False), {**raw, "tie_word_embeddings": False}
        notes = (*notes, _OWN_HEAD)
    name = name or readable(path.resolve().name)
    inputs = Inputs.of_folder(CheckpointError, path, before, files)
    return Checkpoint(path, config, raw, weights, inputs, name, revision, notes, own_head)


def refuse_other_weights(path: Path, raw: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Raise CheckpointError if config.json names other weights than the files that were found."""
    named = raw.get(NAMED_WEIGHTS)
    if named is not None and named not in [INDEX, *(file.name for file in files if len(files) == 1)]:
        raise CheckpointError(
            f"config.json says that the weights are in {str(named)[:80]} ({NAMED_WEIGHTS}), which transformers loads;"
            f" {path} has others too, in {files[0].name}.",
            hint=f"Keep one of the two: under the name model.safetensors or {INDEX}, without {NAMED_WEIGHTS}.",
        )


def _has_own_head(weights: Weights) -> bool:
    return HEAD in weights.tensors and not same_values((weights, EMBEDDING), (weights, HEAD))


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json. Raises CheckpointError, also if it names others for releases of transformers."""
    raw = read_json(file, CheckpointError)
    refuse_versions(file, raw, "configuration_files", CheckpointError)
    return raw


def find_config(path: Path) -> Path:
    """Find a folder's config.json. Raises CheckpointError with what is there instead, and what to name."""
    try:
        config = path / CONFIG
        if config.is_file():
            return config
        if not path.exists():
            raise CheckpointError(f"There is no folder or file {path}.", hint="Check the spelling of the path.")
        if not path.is_dir():
            inside = (path.parent / CONFIG).is_file() or (path.parent / ADAPTER_CONFIG).is_file()
            raise CheckpointError(
                f"{path} is a file; a checkpoint is a folder with config.json and *.safetensors.",
                hint=f"Name the folder that it is in: {path.parent}" if inside else _WHAT_TO_NAME,
            )
        if (path / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{path} is a LoRA adapter, not a model.", hint=f"Use its base model, with --lora {path}"
            )
        raise CheckpointError(f"{path} is not a checkpoint: it has no {CONFIG}.", hint=_what_is_in(path))
    except OSError as error:
        raise read_error(path, error, CheckpointError) from error


def _what_is_in(folder: Path) -> str | None:
    """Return a hint for a folder without config.json, from its contents."""
    if (folder / MANIFEST).is_file():
        return f"It is a finished bundle: rkedge chat {folder}"
    inner = sorted(found.parent for found in folder.glob(f"*/{CONFIG}"))
    files = sorted(file for file in folder.glob("*.gguf") if not re.search(r"-0000[2-9]-of-", file.name))
    return f"Name the model inside it: {[*inner, *files][0]}" if inner or files else None


def check_weights(weights: Weights, config: GemmaConfig) -> None:
    """Compare names, shapes and formats with the settings. Raises CheckpointError."""
    expected, found = config.tensors(), weights.tensors
    if HEAD in found:
        # A tied head may be stored nevertheless.
        expected |= replace(config, tie_word_embeddings=False).tensors()
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks the tensor {missing[0]} ({len(missing)} of {len(expected)} tensors missing)."
        )
    surplus = [name for name in found if name not in expected]
    if surplus:
        raise CheckpointError(
            f"The checkpoint has the tensor {surplus[0]}, which a model with this config.json does not have"
            f" ({counted(len(surplus), 'such tensor')}).",
            hint="If this tensor belongs to an adapter, use the base model, and the adapter with --lora.",
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise CheckpointError(
                f"The tensor {name} has the shape {list(info.shape)}; config.json requires {list(shape)}."
            )
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"The tensor {name} contains {info.dtype} numbers: this checkpoint is already quantized.",
                hint="Start from the original 16-bit checkpoint.",
            )
