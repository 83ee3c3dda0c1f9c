"""Interface of every source of weights: named tensors, read in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from rkconvert.tensors.formats import STORAGE, all_finite, to_float32
from rkruntime.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows are read and written in blocks of about this many weights: small enough that several workers' buffers stay small,
# large enough for the disk to run at full speed.
BLOCK_WEIGHTS: Final = 1 << 19
# Weights per step of float arithmetic, so that each step finds the last one's results in the core's cache.
CACHE_WEIGHTS: Final = 1 << 16


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
        """Size of the data, in bytes."""
        return self.size * STORAGE[self.dtype].itemsize

    def require_rows(self, first: int, count: int, what: object, kind: type[InputError] = CheckpointError) -> None:
        """Raise `kind` unless rows `first` to `first + count` of `what` are all within the tensor."""
        rows = self.shape[0] if self.shape else 1
        if not 0 <= first <= first + count <= rows:
            raise kind(f"{what}: cannot read rows {first} to {first + count} of a tensor that has {rows}.")


class Weights(Protocol):
    """A model's tensors by their Hugging Face names.

    Some read files; others wrap a source and change what is read (merge an adapter, dequantize). `read` may be
    called from several threads.
    """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        ...

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows `first` to `first + count` as stored (numpy's form of the format, see `formats.STORAGE`).

        Raises:
            InputError: The tensor does not have all of these rows.
        """
        ...


def row_blocks(shape: tuple[int, ...], weights: int = BLOCK_WEIGHTS) -> Iterator[tuple[int, int]]:
    """Yield the first row and the number of rows of each block of a tensor."""
    step = max(1, weights // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


def read_finite(
    weights: Weights, name: str, first: int, count: int, kind: type[InputError] = CheckpointError
) -> NDArray[Any]:
    """Return rows as `weights.read` does. Raises `kind` for NaN, infinity, and what float32 cannot hold."""
    block = weights.read(name, first, count)
    if not all_finite(block, weights.tensors[name].dtype):
        raise kind(
            f"The tensor {name} has NaN or infinite weights between its rows {first} and {first + count}.",
            hint="A file is damaged, or training diverged: use another revision of the model or of its adapter.",
        )
    return block


def same_values(first: tuple[Weights, str], second: tuple[Weights, str]) -> bool:
    """Whether two tensors have the same values, whatever their formats; reads block by block up to a difference."""
    (weights, name), (others, other) = first, second
    info, other_info = weights.tensors[name], others.tensors[other]
    return info.shape == other_info.shape and all(
        np.array_equal(
            to_float32(weights.read(name, *rows), info.dtype), to_float32(others.read(other, *rows), other_info.dtype)
        )
        for rows in row_blocks(info.shape)
    )


def read_float32(weights: Weights, name: str) -> NDArray[np.float32]:
    """Read a whole small tensor (a norm) as float32."""
    info = weights.tensors[name]
    return to_float32(read_finite(weights, name, 0, info.shape[0]), info.dtype)
