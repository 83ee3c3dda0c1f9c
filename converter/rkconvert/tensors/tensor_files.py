"""The weight files of a folder, one file or shards with an index, as one set of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Protocol

from rkconvert.tensors.shards import Entry, Shard, read_json
from rkconvert.tensors.torch_file import TorchFile
from rkconvert.tensors.weights import TensorInfo, Weights
from rkruntime.errors import InputError
from rkruntime.words import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TWO_SAVES: Final = "The folder contains files of two saves: remove those that do not belong together."
# Buffers that older transformers releases saved; they are computed, not learned.
_IGNORED: Final = ("rotary_emb.inv_freq",)


class TensorFile(Protocol):
    """One file of tensors."""

    path: Path
    entries: Mapping[str, Entry]

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows of a tensor, as stored."""
        ...


@dataclass(frozen=True)
class Names:
    """Names of weight files, in order of preference: (single file, index of shards)."""

    pairs: tuple[tuple[str, str], ...]


INDEX: Final = "model.safetensors.index.json"
MODEL_FILES: Final = Names(
    (
        ("model.safetensors", INDEX),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    )
)
ADAPTER_FILES: Final = Names(
    (
        ("adapter_model.safetensors", "adapter_model.safetensors.index.json"),
        ("adapter_model.bin", "adapter_model.bin.index.json"),
    )
)


class FileWeights:
    """The tensors of one or more files."""

    def __init__(self, files: Iterable[TensorFile], kind: type[InputError], index: Mapping[str, str] | None) -> None:
        self._home: dict[str, TensorFile] = {}
        for file in files:
            for name in file.entries:
                if name.endswith(_IGNORED):
                    continue
                if name in self._home:
                    raise kind(
                        f"The tensor {name} is both in {self._home[name].path.name} and in {file.path.name}.",
                        hint=_TWO_SAVES,
                    )
                # Other programs use what is in the files, whatever the index says.
                if index is not None and name not in index:
                    raise kind(
                        f"{file.path} contains the tensor {name}, which the index does not name.", hint=_TWO_SAVES
                    )
                self._home[name] = file

    def file_of(self, name: str) -> str | None:
        """Return the name of the file that a tensor is in; None if there is no such tensor."""
        return self._home[name].path.name if name in self._home else None

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        return {name: file.entries[name].info for name, file in self._home.items()}

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows of a tensor, as stored."""
        return self._home[name].read(name, first, count)


def open_tensor_files(folder: Path, names: Names, kind: type[InputError]) -> tuple[tuple[Path, ...], Weights]:
    """Open the weight files of a folder.

    Raises:
        InputError: (of class `kind`) None found; one missing, truncated or damaged; or an index that does not match.
    """
    paths, index = find_files(folder, names, kind)
    weights = FileWeights([_open(path, kind) for path in paths], kind, index)
    wrong = (name for name, file in (index or {}).items() if weights.file_of(name) != file)
    lost = [name for name in wrong if not name.endswith(_IGNORED)]
    if index and lost:
        raise kind(
            f"{folder}: the index says that {lost[0]} is in {index[lost[0]]}, but it is not"
            f" ({counted(len(lost), 'tensor')} missing)."
        )
    return tuple(paths), weights


def _open(path: Path, kind: type[InputError]) -> TensorFile:
    return TorchFile(path, kind) if path.suffix == ".bin" else Shard(path, kind)


def find_files(folder: Path, names: Names, kind: type[InputError]) -> tuple[list[Path], dict[str, str] | None]:
    """Return paths of the files and, for a sharded set, the index's map from tensor to file name."""
    for single, index_name in names.pairs:
        if (folder / index_name).is_file():
            index = _read_index(folder / index_name, kind)
            if (folder / single).is_file() and set(index.values()) != {single}:
                raise kind(
                    f"{folder} has weights twice: {single}, which other programs prefer, and {index_name} with"
                    f" {counted(len(set(index.values())), 'file')} of its own.",
                    hint=_TWO_SAVES,
                )
            return [_shard_path(folder / index_name, name, kind) for name in sorted(set(index.values()))], index
        if (folder / single).is_file():
            return [folder / single], None
    found = sorted(folder.glob("*.safetensors"))
    single, index_name = names.pairs[0]
    if not found:
        raise kind(f"{folder} has no weights: neither {single} nor {index_name} nor any *.safetensors.")
    if any("-of-" in file.name for file in found):
        raise kind(f"{folder} has shards such as {found[0].name}, but not the {index_name} that belongs to them.")
    return found, None


def _read_index(path: Path, kind: type[InputError]) -> dict[str, str]:
    index = read_json(path, kind).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise kind(f"{path} has no weight_map from tensor names to file names.")
    return index


def _shard_path(index: Path, name: str, kind: type[InputError]) -> Path:
    if len(PurePosixPath(name).parts) != 1 or name in ("", ".", "..", "/") or "\\" in name or "\0" in name:
        raise kind(f"{index} names a file outside the folder: {name[:80]!r}.")
    try:
        there = (index.parent / name).is_file()
    except OSError:  # no file can have that name, or the disk fails
        there = False
    if not there:
        raise kind(
            f"{index.parent} lacks the file {name[:80]}, which its index names.",
            hint="The download is incomplete. Download the missing file.",
        )
    return index.parent / name
