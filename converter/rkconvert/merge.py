"""Adapters folded into a base model while its tensors are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rkconvert.adapter import Adapter
from rkconvert.gemma import EMBEDDING, HEAD, GemmaConfig
from rkconvert.updates import Dora, TensorUpdate
from rkconvert.weights import TensorInfo, Weights
from rkruntime.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MergedWeights:
    """A base model with adapters merged in, one after another. Formats are the base's, also of grown embeddings.

    Attributes:
        config: the base's settings, with the new vocabulary and with untied embeddings where an adapter asks for them.
        tensors: every tensor of the merged model.
    """

    def __init__(self, base: Weights, config: GemmaConfig, adapters: Sequence[Adapter]) -> None:
        self._base = base
        self._updates: dict[str, TensorUpdate] = {}
        for adapter in adapters:
            for name, update in adapter.updates.items():
                self._updates[name] = _join(name, self._updates.get(name), update)
        untied = any(adapter.unties for adapter in adapters)
        self.config = replace(
            config,
            vocab_size=_vocab_size(config.vocab_size, adapters),
            tie_word_embeddings=config.tie_word_embeddings and not untied,
        )
        # Where embeddings come apart, each side begins as what both were.
        self._from = {HEAD: EMBEDDING} if untied and config.tie_word_embeddings else {}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(base.tensors[self._from.get(name, name)].dtype, shape)
            for name, shape in self.config.tensors().items()
        }

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that are not the base's own."""
        return frozenset(self._updates) | frozenset(self._from)

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows of a tensor, merged, in the base's format."""
        update, dtype = self._updates.get(name, TensorUpdate()), self.tensors[name].dtype
        if update.replacement:
            block = update.replacement.read(first, count, dtype)
        else:
            block = self._base.read(self._from.get(name, name), first, count)
        for change in update.changes:
            block = change.apply(block, dtype, first)
        return block


def _join(name: str, first: TensorUpdate | None, second: TensorUpdate) -> TensorUpdate:
    if first is None:
        return second
    if second.replacement:
        raise AdapterError(f"Two adapters replace {name} as a whole, or one replaces what another changed.")
    changes = first.changes + second.changes
    if any(isinstance(change, Dora) for change in changes):
        raise AdapterError(
            f"DoRA depends on the weights that it was trained on, so it is not merged together with another adapter"
            f" that changes {name}.",
            hint="If that is what you want, merge one with `rkedge merge`, and convert the result with the other.",
        )
    return TensorUpdate(first.replacement, changes)


def _vocab_size(base: int, adapters: Sequence[Adapter]) -> int:
    sizes = {rows for adapter in adapters for rows in adapter.rows.values()}
    if len(sizes) > 1:
        raise AdapterError(f"The adapters have embeddings of different sizes: {', '.join(map(str, sorted(sizes)))}.")
    return sizes.pop() if sizes else base
