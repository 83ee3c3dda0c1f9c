"""Read a LoRA folder as peft's save_pretrained writes it, and match it to a base model's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from rkconvert.adapters.config import AdapterConfig
from rkconvert.adapters.contents import TOKENS, check_contents
from rkconvert.adapters.targets import Targets
from rkconvert.adapters.updates import Change, Dora, LowRank, Replacement, TensorUpdate, TokenRows
from rkconvert.model.family import EMBEDDING, HEAD
from rkconvert.tensors.formats import FLOATS, to_float32
from rkconvert.tensors.tensor_files import ADAPTER_FILES, open_tensor_files
from rkconvert.tensors.weights import Weights, read_finite, same_values
from rkruntime.errors import AdapterError
from rkruntime.words import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PREFIX: Final = "base_model.model."
# Copies that peft saves beside the tensor itself when embeddings were trained or resized.
_COPIES: Final = re.compile(r"(?P<module>.*)\.(original_module|modules_to_save)\.weight")
# The adapter's name, which a state_dict that was saved without peft keeps: peft loads such names, too.
_DEFAULT: Final = ".default"
_PART: Final = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[AB](\.default)?\.weight|lora_B(\.default)?\.bias|lora_embedding_[AB](\.default)?"
    r"|lora_magnitude_vector((\.default)?\.weight)?|token_adapter\.trainable_tokens_delta"
    r"|token_adapter\.base_layer\.weight|base_layer\.weight|weight)"
)
_WHOLE_TENSORS: Final = ("weight", "base_layer", "token_adapter.base_layer")
_EMBEDDINGS: Final = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.

    Attributes:
        path: The adapter's folder; `name` is the folder's name or the hub id, `revision` a hub model's commit.
        base_name: Base model that the adapter names (may be empty).
        updates: Its changes, by the base model's tensor name. For a base that ties its head to the embedding both
            sides are named; if one and the same update is used for both, they stay tied.
        own_tokens: Whether it changes the embedding or the head, or their size, so that it needs its own tokenizer.
        untied: Whether its settings tie the matrices of embedding and head (ensure_weight_tying), but its file has
            different ones: peft unties them if the base has 16 bits.
        notes: Notes for the user.
        weight_files: Files for the hash in the manifest.
    """

    path: Path
    base_name: str
    updates: Mapping[str, TensorUpdate]
    own_tokens: bool
    untied: bool
    notes: tuple[str, ...]
    weight_files: tuple[Path, ...]
    name: str
    revision: str


def open_adapter(
    path: Path, base: Mapping[str, tuple[int, ...]], weight: float = 1.0, name: str | None = None, revision: str = ""
) -> Adapter:
    """Read an adapter and match it to a base model's tensors, given by name and shape.

    Args:
        path: Folder of the adapter.
        base: Shapes by name, without `lm_head.weight` if the base ties its head to the embedding.
        weight: Factor for the whole adapter, as in peft's set_scale.
        name: Hub id, unless it is the user's own folder; `revision` is its commit.

    Raises:
        AdapterError: Not an adapter, of an unsupported kind, or made for another base.
    """
    config = AdapterConfig.read(path)
    files, weights = open_tensor_files(path, ADAPTER_FILES, AdapterError)
    parts = _group(weights)
    if not parts:
        raise AdapterError(f"{path} contains no LoRA matrices.")
    targets = Targets.of(config, base)
    notes = check_contents(targets, parts)
    reader = _AdapterReader(config, targets, weights, {**base, **_tied_shapes(base, parts, weights)}, weight)
    updates = {f"{module}.weight": reader.update(module, found) for module, found in sorted(parts.items())}
    if HEAD not in base:
        sides = [updates.get(side, TensorUpdate()) for side in _EMBEDDINGS]
        updates |= _tied(*sides, as_one=targets.tie == "modules_to_save")
    updates = {name: update for name, update in updates.items() if update != TensorUpdate()}
    own_tokens = any(_is_change(updates[side], base[EMBEDDING]) for side in _EMBEDDINGS if side in updates)
    untied = targets.tie == "target_modules" and _differ(*(updates.get(side) for side in _EMBEDDINGS))
    name = name or path.resolve().name
    return Adapter(path, config.base_name, updates, own_tokens, untied, notes, files, name, revision)


def _differ(embedding: TensorUpdate | None, head: TensorUpdate | None) -> bool:
    """Whether an embedding's matrices differ from the head's."""
    changes = [change for side in (embedding, head) if side for change in side.changes]
    pairs = [change for change in changes if isinstance(change, LowRank)]
    return any(not pairs[0].same_as(other) for other in pairs[1:])


def _is_change(update: TensorUpdate, shape: tuple[int, ...]) -> bool:
    """Whether an update does more than provide a copy of the base's tensor, which has this shape."""
    start = update.replacement
    return bool(update.changes) or (start is not None and (start.trained or start.info.shape != shape))


def lost_rows(name: str, rows: int, base_rows: int) -> AdapterError:
    """Return the error for a resized vocabulary whose embeddings peft did not save on both sides."""
    return AdapterError(
        f"The adapter needs {rows:,} rows of {name}, but the base model has {base_rows:,}, and the adapter's file lacks"
        " them: peft did not save them.",
        hint="Use the base model with the resized vocabulary that it was trained on, or save the adapter again with"
        " modules_to_save=['embed_tokens', 'lm_head'].",
    )


def _tied_shapes(
    base: Mapping[str, tuple[int, ...]], parts: Mapping[str, Mapping[str, str]], weights: Weights
) -> dict[str, tuple[int, ...]]:
    """Return shapes of tied embeddings: if one of the two was resized, so was the other. Empty if they are not tied."""
    if HEAD in base:
        return {}
    found = [parts.get(side.removesuffix(".weight"), {}) for side in _EMBEDDINGS]
    shapes = [weights.tensors[side[part]].shape for side in found for part in _WHOLE_TENSORS if part in side]
    rows, width = base[EMBEDDING]
    return dict.fromkeys(_EMBEDDINGS, (shapes[0][0] if shapes and len(shapes[0]) == 2 else rows, width))


def _group(weights: Weights) -> dict[str, dict[str, str]]:
    """Map module -> part -> the tensor's name in the file."""
    parts: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    for name in weights.tensors:
        short = name.removeprefix(_PREFIX)
        if copy := _COPIES.fullmatch(short):
            copies[copy["module"]] = name
            continue
        match = _PART.fullmatch(short)
        if match is None:
            raise AdapterError(f"The adapter has the tensor {name}, which no supported kind of LoRA has.")
        found = parts.setdefault(match["module"], {})
        part = match["part"].removesuffix(".weight").replace(_DEFAULT, "")
        # peft writes a tied head's DoRA magnitudes under their older name too.
        if part in found and not _same(weights, found[part], name):
            raise AdapterError(f"The adapter has both {found[part]} and {name}, two values for one tensor.")
        found[part] = name
    for module, name in copies.items():
        if "weight" not in parts.get(module, ()):
            raise AdapterError(f"The adapter has {name} but not {module}.weight, from which peft loads that module.")
    return parts


def _same(weights: Weights, first: str, second: str) -> bool:
    known = all(weights.tensors[name].dtype in FLOATS for name in (first, second))
    return known and same_values((weights, first), (weights, second))


def _tied(embedding: TensorUpdate, head: TensorUpdate, *, as_one: bool) -> dict[str, TensorUpdate]:
    """Derive an adapter's changes to each of two tied embeddings from its file.

    As in the unmerged PeftModel: a trained tensor belongs to its own side, the base's as seen in training to both
    sides, and so do trained tokens of the input embedding.

    Args:
        as_one: Whether the settings tie a trained head to the trained embedding.

    Raises:
        AdapterError: The file has two values for one tensor, or a combination that peft itself merges wrongly.
    """
    first, second = embedding.replacement, head.replacement
    if first and second and same_values((first.source, first.name), (second.source, second.name)):
        second = first
    elif first and second and (as_one or not (first.trained or second.trained)):
        raise AdapterError(
            "The adapter's copies of the embedding and of the head differ, but the base model ties the two.",
            hint="It was trained on a model with a separate head: use that one.",
        )
    shared = next((start for start in (first, second) if start and not start.trained), None)
    changes = head.changes
    tokens = [change for change in embedding.changes if isinstance(change, TokenRows)]
    if tokens:
        same = all(isinstance(change, TokenRows) and change.same_as(tokens[0]) for change in changes)
        if not same or (second and second.trained):
            raise AdapterError(
                "The adapter has trained tokens in the embedding and does something else to the head, which the base"
                " model ties to it. peft itself merges that wrongly.",
                hint="Train the same tokens on both sides, or untie the base model and train on that.",
            )
        changes = embedding.changes
    return {EMBEDDING: TensorUpdate(first or shared, embedding.changes), HEAD: TensorUpdate(second or shared, changes)}


@dataclass(frozen=True)
class _AdapterReader:
    """Builds updates from a file's tensors."""

    config: AdapterConfig
    targets: Targets
    weights: Weights
    base: Mapping[str, tuple[int, ...]]
    weight: float

    def update(self, module: str, parts: Mapping[str, str]) -> TensorUpdate:
        """Return all that the adapter does to one module's weight; every part is either used or an error."""
        whole = [part for part in _WHOLE_TENSORS if part in parts]
        rest = parts.keys() - set(whole)
        kind = "tokens" if rest == {TOKENS} else "lora" if rest and TOKENS not in rest else "none" if not rest else ""
        embedding = f"{module}.weight" in _EMBEDDINGS
        # Before release 0.7, peft saved an embedding under LoRA as `weight`.
        allowed = {"tokens": ["token_adapter.base_layer"], "lora": ["base_layer", *["weight"] * embedding]}
        if len(whole) > 1 or not kind or not set(whole) <= set(allowed.get(kind, ["weight"])):
            raise AdapterError(f"The adapter has {', '.join(sorted(parts))} for {module}, which do not go together.")
        shape = self._shape(module)
        start = self._replacement(module, shape, parts[whole[0]], kind == "none") if whole else None
        shape = start.info.shape if start else shape
        if kind == "tokens":
            return TensorUpdate(start, (self._token_rows(module, shape, parts[TOKENS]),))
        return TensorUpdate(start, (self._low_rank(module, shape, parts),) if kind == "lora" else ())

    def _shape(self, module: str) -> tuple[int, ...]:
        shape = self.base.get(f"{module}.weight")
        if shape is None:
            raise AdapterError(f"The adapter changes {module}, which the base model does not have.")
        return shape

    def _replacement(self, module: str, shape: tuple[int, ...], name: str, alone: bool) -> Replacement:
        info = self.weights.tensors[name]
        embedding = f"{module}.weight" in _EMBEDDINGS
        wrong = len(info.shape) != len(shape) or info.shape[embedding:] != shape[embedding:]
        if info.dtype not in FLOATS or wrong:
            raise AdapterError(
                f"The adapter's own {module} is {info.dtype} {list(info.shape)}; the base model's is {list(shape)}."
            )
        trained = alone and (not embedding or self.targets.is_saved(module))
        if trained and self.weight != 1:
            raise AdapterError(
                f"The adapter replaces {module} as a whole, so it cannot have the weight {self.weight:g}."
            )
        return Replacement(self.weights, name, trained)

    def _low_rank(self, module: str, shape: tuple[int, ...], parts: Mapping[str, str]) -> Change:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        if "lora_B.bias" in parts:
            raise AdapterError(f"The adapter has a bias in {module} (lora_bias), but Gemma has no bias to add it to.")
        sides = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for side in sides:
            if side not in parts:
                raise AdapterError(f"The adapter has no {side} for {module}, only its counterpart.")
        self._check_parts(module, parts.keys() - {*sides, *_WHOLE_TENSORS})
        a, b = (self._matrix(parts[side], 2) for side in sides)
        rank = self.config.rank(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(
                f"The adapter's matrices for {module} have rank {a.shape[0]} and {b.shape[1]}, but its settings"
                f" say {rank}."
            )
        rounds = embedding or self.config.mica
        a, b = (b.T, a.T) if embedding else (a, b)
        low_rank = LowRank(a, b, self.config.scaling(module) * self.weight, rounds)
        if low_rank.shape != shape:
            self._refuse_lost_rows(module, low_rank.shape[0], shape)
            raise AdapterError(
                f"The adapter changes {module} by a matrix {list(low_rank.shape)}; the base model's is {list(shape)}.",
                hint=f"It was trained on another model: use its own base{self.config.base_hint}.",
            )
        return low_rank if "lora_magnitude_vector" not in parts else self._dora(module, low_rank, parts)

    def _check_parts(self, module: str, others: Set[str]) -> None:
        """Check what is beside a pair of matrices: DoRA's magnitudes if the settings say so, and nothing else."""
        magnitudes = {"lora_magnitude_vector"} if self.config.dora else set()
        if magnitudes - others:
            raise AdapterError(f"The adapter's settings say DoRA (use_dora), but it has no magnitudes for {module}.")
        if others - magnitudes:
            raise AdapterError(
                f"The adapter has {', '.join(sorted(others - magnitudes))} for {module}, which peft would not use with"
                " its settings."
            )

    def _refuse_lost_rows(self, module: str, rows: int, shape: tuple[int, ...]) -> None:
        """Raise if the vocabulary had another size in training, and the file lacks the embedding's rows."""
        if f"{module}.weight" in _EMBEDDINGS and rows != shape[0]:
            raise lost_rows(f"{module}.weight", rows, shape[0])

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
        indices = self.targets.tokens.get(module, [])
        if self.weight != 1:
            raise AdapterError(
                f"The adapter replaces tokens of {module}, so it cannot have the weight {self.weight:g}."
            )
        tokens = TokenRows(dict(zip(indices, rows, strict=False)))
        # A token may be named twice if both of its rows are equal.
        same = all(np.array_equal(tokens.rows[index], row) for index, row in zip(indices, rows, strict=False))
        if rows.shape != (len(indices), shape[1]) or not same or min(indices, default=0) < 0:
            raise AdapterError(
                f"The adapter has {rows.shape[0]} trained tokens of width {rows.shape[1]} for {module}; its settings"
                f" name {len(set(indices))}, and the model has {shape[0]} tokens of width {shape[1]}."
            )
        self._refuse_lost_rows(module, max([shape[0], *(index + 1 for index in indices)]), shape)
        return tokens

    def _matrix(self, name: str, rank: int) -> NDArray[np.float32]:
        info = self.weights.tensors[name]
        if info.dtype not in FLOATS or len(info.shape) != rank:
            raise AdapterError(
                f"Expected {name} to be a float tensor with {counted(rank, 'dimension')};"
                f" it is {info.dtype} {list(info.shape)}."
            )
        # peft keeps adapters in float32, whatever format they were saved in.
        return to_float32(read_finite(self.weights, name, 0, info.shape[0], AdapterError), info.dtype)
