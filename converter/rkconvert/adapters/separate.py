"""An adapter as a file of its own: pairs of matrices for the layers, all of one rank and with one factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rkconvert.adapters.reader import Adapter
from rkconvert.adapters.updates import LowRank
from rkruntime.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Padding to one rank may make an adapter this many times larger, or this many bytes: a huge rank could exhaust memory.
_MOST_GROWTH: Final = 8
_SMALL: Final = 64 << 20


@dataclass(frozen=True)
class SeparateLora:
    """All that a separate LoRA file can express: weight + alpha / rank * (b @ a).

    Attributes:
        pairs: a [rank, in] and b [out, rank], float32, by the base model's tensor name.
    """

    rank: int
    alpha: int
    pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]

    @property
    def nbytes(self) -> int:
        """Size of the matrices, in bytes."""
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())


def separate_lora(adapter: Adapter) -> SeparateLora:
    """Return an adapter as a SeparateLora: zeros pad smaller ranks, and b absorbs any other factor.

    Raises:
        AdapterError: The adapter does more than add such products to layers' matrices, or its ranks are too far apart.
    """
    changes = {name: _low_rank(adapter, name) for name in adapter.updates}
    rank = max(len(change.a) for change in changes.values())
    _refuse_growth(changes.values(), rank)
    first = next(iter(changes.values()))
    # An ordinary adapter keeps its alpha and its matrices; the factors of rsLoRA and the like are not whole numbers.
    alpha = round(first.scaling * rank)
    if alpha < 1 or alpha / rank != first.scaling:
        alpha = rank
    pairs = {}
    for name, change in changes.items():
        missing = rank - len(change.a)
        with np.errstate(over="ignore"):
            b = change.b * np.float32(change.scaling * rank / alpha)
        if not np.isfinite(b).all():
            raise AdapterError(f"The adapter's matrices for {name} are infinite when they are scaled.")
        pairs[name] = np.pad(change.a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
    return SeparateLora(rank, alpha, pairs)


def _refuse_growth(changes: Iterable[LowRank], rank: int) -> None:
    sizes = [(len(change.a), 4 * sum(change.shape)) for change in changes]
    own, filled = (sum(length * width for length, width in sizes), sum(rank * width for _, width in sizes))
    if filled > max(_SMALL, _MOST_GROWTH * own):
        raise AdapterError(
            f"The adapter's ranks go from {min(sizes)[0]} to {rank}: written with one rank for all, as an RKLLM LoRA"
            f" file may need it, it would take {filled / 1e9:.1f} GB instead of {own / 1e9:.1f}.",
            hint="Merge it: --lora-mode merge.",
        )


def _low_rank(adapter: Adapter, name: str) -> LowRank:
    update = adapter.updates[name]
    change = update.changes[0] if len(update.changes) == 1 and update.replacement is None else None
    if not isinstance(change, LowRank) or change.round_delta or not name.startswith("model.layers."):
        raise AdapterError(
            f"The adapter does more to {name} than add the product of two small matrices to a layer's matrix, which"
            " is all that an RKLLM LoRA file can express.",
            hint="Merge it: --lora-mode merge.",
        )
    return change
