"""Adapters folded into a base model while its tensors are read, with the arithmetic of peft's merge_and_unload.

peft (tuners/lora/layer.py, Linear.merge and get_delta_weight, release 0.21) holds the adapter in float32, multiplies
its matrices in float32, scales the product, adds it to the weight in float32 and rounds once to the weight's format.
Blocks of rows give the same bits as the whole matrix, because each element is a sum over the rank alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rkconvert.adapter import Adapter, LoraPair
from rkconvert.formats import from_float32, to_float32
from rkconvert.weights import TensorInfo, Weights
from rkruntime.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MergedWeights:
    """A base model's weights with adapters merged in, one after another; formats are the base's."""

    def __init__(self, base: Weights, adapters: Sequence[Adapter]) -> None:
        self._base = base
        self._pairs: dict[str, list[LoraPair]] = {}
        for adapter in adapters:
            for name, pair in adapter.pairs.items():
                self._pairs.setdefault(name, []).append(pair)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors."""
        return self._base.tensors

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows of a tensor, merged, in the base's format."""
        block = self._base.read(name, first, count)
        for pair in self._pairs.get(name, ()):
            block = merge_rows(block, self.tensors[name].dtype, pair, first)
        return block


def merge_rows(block: NDArray[Any], dtype: str, pair: LoraPair, first: int) -> NDArray[Any]:
    """`block`, rows of a weight from row `first` on in the format `dtype`, with the pair's update added."""
    delta: NDArray[np.float32] = pair.b[first : first + len(block)] @ pair.a
    delta *= np.float32(pair.scaling)
    delta += to_float32(block, dtype)
    if not np.isfinite(delta).all():
        raise AdapterError("Merging the adapter gives NaN or infinite weights: adapter or base are damaged.")
    return from_float32(delta, dtype)
