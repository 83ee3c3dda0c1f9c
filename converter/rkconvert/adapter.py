"""A LoRA folder as peft's save_pretrained writes it, read and matched to a base model's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from rkconvert.adapter_config import AdapterConfig
from rkconvert.formats import FLOATS, to_float32
from rkconvert.gemma import EMBEDDING, HEAD
from rkconvert.tensor_files import ADAPTER_FILES, open_tensor_files
from rkconvert.updates import Change, Dora, LowRank, Replacement, TensorUpdate, TokenRows
from rkconvert.weights import Weights, read_finite
from rkruntime.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PREFIX: Final = "base_model.model."
# Copies that peft saves beside the tensor itself when embeddings were trained or grew.
_COPIES: Final = re.compile(r".*\.(original_module|modules_to_save)\.weight")
_PART: Final = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?|token_adapter\.trainable_tokens_delta|token_adapter\.base_layer\.weight"
    r"|base_layer\.weight|weight)"
)
_WHOLE_TENSORS: Final = ("weight", "base_layer", "token_adapter.base_layer")
_EMBEDDINGS: Final = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.

    Attributes:
        path: its folder; `name` is the folder's name or the hub id, `revision` a hub model's commit.
        base_name: what it says its base model is (may be empty).
        updates: what it does, by the base model's tensor name.
        unties: input embedding and output head, tied in the base, differ afterwards.
        weight_files: for the hash in the manifest.
    """

    path: Path
    base_name: str
    updates: Mapping[str, TensorUpdate]
    unties: bool
    weight_files: tuple[Path, ...]
    name: str
    revision: str

    @property
    def rows(self) -> dict[str, int]:
        """New number of rows of embeddings that are replaced."""
        own = {name: self.updates[name].replacement for name in _EMBEDDINGS if name in self.updates}
        return {name: replacement.info.shape[0] for name, replacement in own.items() if replacement}


def open_adapter(
    path: Path, base: Mapping[str, tuple[int, ...]], weight: float = 1.0, name: str | None = None, revision: str = ""
) -> Adapter:
    """Read an adapter and match it to a base model's tensors, given by name and shape.

    Args:
        path: the folder.
        base: without `lm_head.weight` where the base ties its head to the embedding.
        weight: factor for the whole adapter, as peft's set_scale.
        name: hub id, if it is not a folder of the user's own; with its commit, `revision`.

    Raises:
        AdapterError: not an adapter, a kind that is not supported, or one that was made for another base.
    """
    config = AdapterConfig.read(path)
    files, weights = open_tensor_files(path, ADAPTER_FILES, AdapterError)
    parts = _group(weights)
    if not parts:
        raise AdapterError(f"{path} holds no LoRA matrices.")
    config.check_targets(base)
    reader = _Reader(config, weights, base, weight)
    updates = {f"{module}.weight": reader.update(module, found) for module, found in sorted(parts.items())}
    updates = {name: update for name, update in updates.items() if update != TensorUpdate()}
    tied = HEAD not in base
    if tied and _same_embeddings(config, updates):
        updates.pop(HEAD, None)
    unties = tied and (HEAD in updates or _changes_input_only(config, updates))
    return Adapter(path, config.base_name, updates, unties, files, name or path.resolve().name, revision)


def _group(weights: Weights) -> dict[str, dict[str, str]]:
    """module -> part -> the tensor's name in the file."""
    parts: dict[str, dict[str, str]] = {}
    for name in weights.tensors:
        short = name.removeprefix(_PREFIX)
        match = _PART.fullmatch(short)
        if _COPIES.fullmatch(short):
            continue
        if match is None:
            raise AdapterError(f"The adapter has the tensor {name}, which no supported kind of LoRA has.")
        parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = name
    return parts


def _same_embeddings(config: AdapterConfig, updates: Mapping[str, TensorUpdate]) -> bool:
    """Whether what is saved for the head is only the tied embedding again."""
    changes = [change for name in _EMBEDDINGS if name in updates for change in updates[name].changes]
    plain = EMBEDDING in updates and all(isinstance(change, TokenRows) for change in changes)
    return plain and (config.ensure_weight_tying or not config.saves_module("embed_tokens", "lm_head"))


def _changes_input_only(config: AdapterConfig, updates: Mapping[str, TensorUpdate]) -> bool:
    """Whether the input embedding alone changed. Single tokens and growth go for both sides of tied embeddings."""
    update = updates.get(EMBEDDING, TensorUpdate())
    trained = config.saves_module("embed_tokens") and not config.ensure_weight_tying
    return any(isinstance(change, LowRank) for change in update.changes) or bool(update.replacement and trained)


@dataclass(frozen=True)
class _Reader:
    """Makes updates of a file's tensors."""

    config: AdapterConfig
    weights: Weights
    base: Mapping[str, tuple[int, ...]]
    weight: float

    def update(self, module: str, parts: Mapping[str, str]) -> TensorUpdate:
        """Everything that the adapter does to one module's weight."""
        shape = self._shape(module)
        replacement = self._replacement(module, shape, parts)
        if replacement:
            shape = replacement.info.shape
        changes: list[Change] = []
        if any(part.startswith("lora_") for part in parts):
            changes.append(self._low_rank(module, shape, parts))
        if "token_adapter.trainable_tokens_delta" in parts:
            changes.append(self._token_rows(module, shape, parts["token_adapter.trainable_tokens_delta"]))
        return TensorUpdate(replacement, tuple(changes))

    def _shape(self, module: str) -> tuple[int, ...]:
        # A tied head has the embedding's shape.
        name = f"{module}.weight"
        shape = self.base.get(EMBEDDING if name == HEAD and HEAD not in self.base else name)
        if shape is None:
            raise AdapterError(f"The adapter changes {module}, which the base model has not.")
        return shape

    def _replacement(self, module: str, shape: tuple[int, ...], parts: Mapping[str, str]) -> Replacement | None:
        part = next((part for part in _WHOLE_TENSORS if part in parts), None)
        if part is None:
            return None
        info = self.weights.tensors[parts[part]]
        grows = f"{module}.weight" in _EMBEDDINGS
        if info.dtype not in FLOATS or info.shape[1:] != shape[1:] or (info.shape != shape and not grows):
            raise AdapterError(
                f"The adapter's own {module} is {info.dtype} {list(info.shape)}; the base model's is {list(shape)}."
            )
        if part != "weight" and info.shape == shape:
            # peft saves the untouched base embedding beside a LoRA on it.
            return None
        if self.weight != 1:
            raise AdapterError(
                f"The adapter replaces {module} as a whole, so it cannot have the weight {self.weight:g}."
            )
        return Replacement(self.weights, parts[part])

    def _low_rank(self, module: str, shape: tuple[int, ...], parts: Mapping[str, str]) -> Change:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        if "lora_B.bias" in parts:
            raise AdapterError(f"The adapter has a bias in {module} (lora_bias), and Gemma has no bias to add it to.")
        sides = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for side in sides:
            if side not in parts:
                raise AdapterError(f"The adapter has no {side} for {module}, only its counterpart.")
        a, b = (self._matrix(parts[side], 2) for side in sides)
        rank = self.config.rank(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(
                f"The adapter's matrices for {module} have rank {a.shape[0]} and {b.shape[1]}; its settings say {rank}."
            )
        rounds = embedding or self.config.mica
        a, b = (b.T, a.T) if embedding else (a, b)
        low_rank = LowRank(a, b, self.config.scaling(module) * self.weight, rounds)
        if low_rank.shape != shape:
            raise AdapterError(
                f"The adapter changes {module} by a matrix {list(low_rank.shape)}; the base model's is {list(shape)}.",
                hint=f"It was trained on another model: give its own base{self.config.base_hint}.",
            )
        return low_rank if "lora_magnitude_vector" not in parts else self._dora(module, low_rank, parts)

    def _dora(self, module: str, low_rank: LowRank, parts: Mapping[str, str]) -> Dora:
        if "lora_embedding_A" in parts:
            raise AdapterError("The adapter has DoRA on the embedding, which is not supported.")
        magnitude = self._matrix(parts["lora_magnitude_vector"], 1)
        if magnitude.shape != (low_rank.shape[0],):
            raise AdapterError(
                f"The adapter's DoRA magnitudes of {module} are {len(magnitude)}, not {low_rank.shape[0]}."
            )
        return Dora(low_rank, magnitude)

    def _token_rows(self, module: str, shape: tuple[int, ...], name: str) -> TokenRows:
        rows = self._matrix(name, 2)
        indices = self.config.token_indices(module)
        if rows.shape != (len(indices), shape[1]) or any(not 0 <= index < shape[0] for index in indices):
            raise AdapterError(
                f"The adapter has {rows.shape[0]} trained tokens of width {rows.shape[1]} for {module}; its settings"
                f" name {len(indices)}, and the model has {shape[0]} tokens of width {shape[1]}."
            )
        return TokenRows(dict(zip(indices, rows, strict=True)))

    def _matrix(self, name: str, rank: int) -> NDArray[np.float32]:
        info = self.weights.tensors[name]
        if info.dtype not in FLOATS or len(info.shape) != rank:
            raise AdapterError(f"The adapter's tensor {name} is {info.dtype} {list(info.shape)}, which it must not be.")
        # peft holds adapters in float32, whatever they were saved as.
        return to_float32(read_finite(self.weights, name, 0, info.shape[0], AdapterError), info.dtype)
