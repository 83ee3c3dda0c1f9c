"""Merge adapters into a base model while its tensors are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.adapters.reader import Adapter, lost_rows
from rkconvert.adapters.updates import Dora, Replacement, TensorUpdate, TokenRows
from rkconvert.model.family import EMBEDDING, HEAD
from rkconvert.model.gemma import GemmaConfig
from rkconvert.tensors.weights import TensorInfo, Weights, same_values
from rkruntime.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


_OTHER_BASE: Final = (
    "the adapter {adapter} was saved with its base's {name}, which differs from this base's: it was trained on another"
    " model, revision or precision; its own is used, as in peft"
)


class MergedWeights:
    """A base model with adapters merged in, one after another. Formats are the base's, even for grown embeddings.

    Attributes:
        config: Base's settings, with the new vocabulary, and with embeddings untied if adapters make them differ.
        tensors: Every tensor of the merged model.
        notes: Notes for the user on what was merged.
    """

    def __init__(self, base: Weights, config: GemmaConfig, adapters: Sequence[Adapter]) -> None:
        self._base = base
        # Names under which the base has a tensor, where they differ: a tied head is the embedding.
        self._from = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
        self._updates: dict[str, TensorUpdate] = {}
        self.notes: tuple[str, ...] = ()
        for adapter in adapters:
            if adapter.untied and self._base_info(EMBEDDING).dtype == "F32":
                raise AdapterError(
                    f"The settings of {adapter.name} tie the matrices of the head to the embedding's"
                    " (ensure_weight_tying), but its file has different ones, as from training on a base in 16 bits;"
                    " in a base in float32 peft uses one of the two for both.",
                    hint="Use the base in the format that the adapter was trained on.",
                )
            copies = self._copies_of_the_base(adapter)
            for name, update in adapter.updates.items():
                own = replace(update, replacement=None) if update.replacement in copies else update
                if own != TensorUpdate():
                    self._updates[name] = _join(name, self._updates.get(name), own)
        tied = config.tie_word_embeddings and self._updates.get(EMBEDDING) == self._updates.get(HEAD)
        self.config = replace(config, vocab_size=self._vocab_size(config), tie_word_embeddings=tied)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(self._base_info(name).dtype, shape) for name, shape in self.config.tensors().items()
        }
        for name, info in self.tensors.items():
            self._check_shape(name, info.shape)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that differ from the base's."""
        return frozenset(name for name in self.tensors if name in self._updates or name not in self._base.tensors)

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return merged rows of a tensor, in the base's format."""
        update, dtype = self._updates.get(name, TensorUpdate()), self.tensors[name].dtype
        if update.replacement:
            block = update.replacement.read(first, count, dtype)
        else:
            block = self._base.read(self._from.get(name, name), first, count)
        # Values too large for float32 become infinite, which the writer refuses.
        with np.errstate(over="ignore", invalid="ignore"):
            for change in update.changes:
                block = change.apply(block, dtype, first)
        return block

    def _base_info(self, name: str) -> TensorInfo:
        return self._base.tensors[self._from.get(name, name)]

    def _copies_of_the_base(self, adapter: Adapter) -> set[Replacement]:
        """Return an adapter's tensors that merely copy the base's. Others that it did not train get a note."""
        copies = {
            update.replacement: self._from.get(name, name)
            for name, update in adapter.updates.items()
            if update.replacement and not update.replacement.trained
        }
        same = {copy for copy, name in copies.items() if same_values((copy.source, copy.name), (self._base, name))}
        for copy, name in copies.items():
            if copy not in same and copy.info.shape == self._base.tensors[name].shape:
                self.notes += (_OTHER_BASE.format(adapter=adapter.name, name=name),)
        return same

    def _vocab_size(self, config: GemmaConfig) -> int:
        starts = [self._updates[name].replacement for name in (EMBEDDING, HEAD) if name in self._updates]
        sizes = {start.info.shape[0] for start in starts if start} - {config.vocab_size} or {config.vocab_size}
        if len(sizes) > 1:
            raise AdapterError(f"The adapters have vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens.")
        size = sizes.pop()
        last = max(config.bos_token_id, *config.eos_token_ids)
        if last >= size:
            raise AdapterError(f"The adapter has embeddings of {size} tokens, but the model needs the token {last}.")
        return size

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise AdapterError if a tensor, or a change to it, does not have the merged model's size."""
        update = self._updates.get(name, TensorUpdate())
        info = update.replacement.info if update.replacement else self._base_info(name)
        if info.shape != shape:
            raise lost_rows(name, shape[0], info.shape[0])
        if not all(change.fits(shape) for change in update.changes):
            raise AdapterError(f"The adapters were trained with vocabularies of different sizes: see {name}.")


def _join(name: str, first: TensorUpdate | None, second: TensorUpdate) -> TensorUpdate:
    if first is None:
        return second
    if second.replacement or (first.replacement and second.changes):
        raise AdapterError(f"Two adapters replace {name} as a whole, or one replaces a tensor that another changed.")
    changes = first.changes + second.changes
    tokens = [change for change in changes if isinstance(change, TokenRows)]
    ids = [index for change in tokens for index in change.rows]
    if tokens and (len(tokens) < len(changes) or len(set(ids)) < len(ids)):
        raise AdapterError(
            f"Two adapters change the same rows of {name}, one of them by individually trained tokens: it is unclear"
            " which of the two such a token should follow.",
        )
    if any(isinstance(change, Dora) for change in changes):
        raise AdapterError(
            f"DoRA depends on the weights that it was trained on, so it is not merged together with another adapter"
            f" that changes {name}.",
            hint="To do it anyway, merge one with `rkedge merge`, then convert the result with the other.",
        )
    return TensorUpdate(first.replacement, changes)
