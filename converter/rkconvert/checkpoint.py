"""A model folder in Hugging Face layout: config.json, tokenizer.json and safetensors, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from rkconvert.formats import FLOATS
from rkconvert.gemma import HEAD, GemmaConfig, parse_config, token_ids
from rkconvert.shards import Shard, read_json
from rkconvert.weights import TensorInfo, Weights
from rkruntime.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
# Buffers that older transformers releases saved; they are computed, not learned.
_IGNORED: Final = ("rotary_emb.inv_freq",)


class SafetensorsWeights:
    """The tensors of one or more safetensors files."""

    def __init__(self, shards: Iterable[Shard], index: Mapping[str, str] | None = None) -> None:
        self._home: dict[str, Shard] = {}
        for shard in shards:
            for name in shard.entries:
                if name.endswith(_IGNORED) or (index is not None and index.get(name) != shard.path.name):
                    continue
                if name in self._home:
                    raise CheckpointError(
                        f"The tensor {name} is both in {self._home[name].path.name} and in {shard.path.name}.",
                        hint="Files of two saves are in one folder: remove those that do not belong together.",
                    )
                self._home[name] = shard

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor there is."""
        return {name: shard.entries[name].info for name, shard in self._home.items()}

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows of a tensor, as stored."""
        return self._home[name].read(name, first, count)


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder.

    Attributes:
        config: its settings; `raw_config` is config.json as it stands.
        weights: every tensor of the model, with the right shape (`check_weights`).
        weight_files: the files that hold them, for hashes and sizes.
    """

    path: Path
    config: GemmaConfig
    raw_config: Mapping[str, Any]
    weights: Weights
    weight_files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
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
        return token_ids("eos_token_id (generation_config.json)", value, self.config.vocab_size)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder and check that it is a whole Gemma model; no weights are read.

    Raises:
        CheckpointError: one message for each thing that can be wrong.
    """
    raw = read_config(path)
    config = parse_config(raw)
    files, index = find_shards(path)
    weights = SafetensorsWeights([Shard(file, CheckpointError) for file in files], index)
    if index is not None:
        _check_index(path, weights, index)
    check_weights(weights, config)
    return Checkpoint(path, config, raw, weights, tuple(files))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder."""
    if not path.exists():
        raise CheckpointError(f"There is no folder {path}.", hint="Check the spelling of the path.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder with config.json and *.safetensors.")
    config = path / CONFIG
    if (path / "adapter_config.json").is_file() and not config.is_file():
        raise CheckpointError(
            f"{path} is a LoRA adapter, not a model.", hint=f"Give its base model, and the adapter as --lora {path}"
        )
    if not config.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no {CONFIG}.")
    return read_json(config, CheckpointError)


def find_shards(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Weight files of a folder and, for a sharded one, the index's map from tensor to file name."""
    if (path / INDEX).is_file():
        index = _read_index(path / INDEX)
        return [_shard_path(path, name) for name in sorted(set(index.values()))], index
    if (path / SINGLE).is_file():
        return [path / SINGLE], None
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{path} has no weights: neither {SINGLE} nor {INDEX} nor any *.safetensors.")
    if any("-of-" in file.name for file in found):
        raise CheckpointError(f"{path} has shards such as {found[0].name}, and not the {INDEX} that belongs to them.")
    return found, None


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()) or not index:
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names.")
    return index


def _shard_path(folder: Path, name: str) -> Path:
    if len(PurePosixPath(name).parts) != 1 or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder / INDEX} names a file outside the folder: {name!r}.")
    if not (folder / name).is_file():
        raise CheckpointError(
            f"{folder} lacks the shard {name}, which its index names.",
            hint="The download was not complete. Download the missing file.",
        )
    return folder / name


def _check_index(path: Path, weights: Weights, index: Mapping[str, str]) -> None:
    lost = [name for name in index if name not in weights.tensors and not name.endswith(_IGNORED)]
    if lost:
        raise CheckpointError(
            f"{path}: the index says that {lost[0]} is in {index[lost[0]]}, and it is not"
            f" ({len(lost)} tensor{'s' * (len(lost) > 1)} missing)."
        )


def check_weights(weights: Weights, config: GemmaConfig) -> None:
    """Compare names, shapes and formats with what the settings ask for. Raises CheckpointError."""
    expected, found = config.tensors(), weights.tensors
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks the tensor {missing[0]} ({len(missing)} of {len(expected)} tensors are missing)."
        )
    # A tied head may be stored all the same.
    surplus = [name for name in found if name not in expected and name != HEAD]
    if surplus:
        raise CheckpointError(
            f"The checkpoint has the tensor {surplus[0]}, which a model of this config.json has not"
            f" ({len(surplus)} such tensors).",
            hint="If it holds an adapter's own tensors, give the base model and the adapter with --lora.",
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise CheckpointError(
                f"The tensor {name} has the shape {list(info.shape)}; config.json asks for {list(shape)}."
            )
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"The tensor {name} holds {info.dtype} numbers: this checkpoint is already quantized.",
                hint="Start from the original 16-bit checkpoint.",
            )
