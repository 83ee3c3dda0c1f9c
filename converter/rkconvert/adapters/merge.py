"""Adapters folded into a base model while its tensors are read."""

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
    "the adapter {adapter} was saved with its base's {name}, which is not this base's: it was trained on another model,"
    " revision or precision; its own is used, as peft does"
)


class MergedWeights:
    """A base model with adapters merged in, one after another. Formats are the base's, also of grown embeddings.

    Attributes:
        config: the base's settings, with the new vocabulary, and with embeddings untied where adapters part them.
        tensors: every tensor of the merged model.
        notes: what a person must know of what was merged.
    """

    def __init__(self, base: Weights, config: GemmaConfig, adapters: Sequence[Adapter]) -> None:
        self._base = base
        # What both sides are as long as they are tied.
        self._from = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
        self._updates: dict[str, TensorUpdate] = {}
        self.notes: tuple[str, ...] = ()
        for adapter in adapters:
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
        """Names of the tensors that are not the base's own."""
        return frozenset(name for name in self.tensors if name in self._updates or name not in self._base.tensors)

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows of a tensor, merged, in the base's format."""
        update, dtype = self._updates.get(name, TensorUpdate()), self.tensors[name].dtype
        if update.replacement:
            block = update.replacement.read(first, count, dtype)
        else:
            block = self._base.read(self._from.get(name, name), first, count)
        # What is too large for float32 becomes infinite, which whoever writes it refuses.
        with np.errstate(over="ignore", invalid="ignore"):
            for change in update.changes:
                block = change.apply(block, dtype, first)
        return block

    def _base_info(self, name: str) -> TensorInfo:
        return self._base.tensors[self._from.get(name, name)]

    def _copies_of_the_base(self, adapter: Adapter) -> set[Replacement]:
        """Those of an adapter's tensors that are only the base's again. Others that it did not train get a note."""
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
            raise AdapterError(f"The adapter has embeddings of {size} tokens, and the model needs the token {last}.")
        return size

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise AdapterError if a tensor, or what changes it, is of another size than the merged model's."""
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
        raise AdapterError(f"Two adapters replace {name} as a whole, or one replaces what another changed.")
    changes = first.changes + second.changes
    tokens = [change for change in changes if isinstance(change, TokenRows)]
    ids = [index for change in tokens for index in change.rows]
    if tokens and (len(tokens) < len(changes) or len(set(ids)) < len(ids)):
        raise AdapterError(
            f"Two adapters change the same rows of {name}, one of them by tokens that it trained singly: which of the"
            " two a token should follow is not known."
        )
    if any(isinstance(change, Dora) for change in changes):
        raise AdapterError(
            f"DoRA depends on the weights that it was trained on, so it is not merged together with another adapter"
            f" that changes {name}.",
            hint="If that is what you want, merge one with `rkedge merge`, and convert the result with the other.",
        )
    return TensorUpdate(first.replacement, changes)
