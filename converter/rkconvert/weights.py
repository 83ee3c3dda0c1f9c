"""What every source of weights looks like to those who read it: named tensors, read in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from rkconvert.formats import STORAGE, all_finite, to_float32
from rkruntime.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows are read and written in blocks of about this many weights: small enough for several threads' buffers to stay
# small, large enough for the disk to run at full speed.
BLOCK_WEIGHTS: Final = 1 << 20
# What float arithmetic takes at a time, so that its steps find each other's results in the cache of a core.
CACHE_WEIGHTS: Final = 1 << 17


@dataclass(frozen=True)
class TensorInfo:
    """Format (a key of `formats.STORAGE`) and shape, outermost dimension first."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.size * STORAGE[self.dtype].itemsize


class Weights(Protocol):
    """A model's tensors by their Hugging Face names.

    Sources read files; others wrap a source and change what is read (merge an adapter, dequantize). `read` may be
    called from several threads.
    """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor there is."""
        ...

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows `first` to `first + count` as they are stored (numpy's form of the format, see `formats.STORAGE`)."""
        ...


def row_blocks(shape: tuple[int, ...], weights: int = BLOCK_WEIGHTS) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each block of a tensor."""
    step = max(1, weights // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


def read_finite(
    weights: Weights, name: str, first: int, count: int, kind: type[InputError] = CheckpointError
) -> NDArray[Any]:
    """`weights.read`, or an error of the class `kind` when there is NaN or infinity in the block."""
    block = weights.read(name, first, count)
    if not all_finite(block, weights.tensors[name].dtype):
        raise kind(
            f"The tensor {name} has NaN or infinite weights between its rows {first} and {first + count}.",
            hint="A file is damaged or a training diverged: use another revision of the model or of its adapter.",
        )
    return block


def read_float32(weights: Weights, name: str) -> NDArray[np.float32]:
    """A whole small tensor (a norm) as float32."""
    info = weights.tensors[name]
    return to_float32(read_finite(weights, name, 0, info.shape[0]), info.dtype)
