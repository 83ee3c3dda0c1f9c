"""Apply an adapter's changes to one tensor in blocks of rows, with the arithmetic of peft's merge_and_unload.

peft (release 0.21; tuners/lora/layer.py and variants.py) keeps adapters in float32, multiplies the two matrices in
float32 and scales the product. For a linear layer it adds that to the weight in float32 and rounds once to the
weight's format; for an embedding it rounds the product first.

Each element is a sum over the rank alone, so blocks of rows give the same result as the whole matrix, as long as both
libraries (numpy's BLAS here, torch's there) add in the same order. Whether they do depends on shape, rank and CPU; if
they do not, elements differ by the rounding of the sum, about 1e-7 of it. docs/convert.md has the measurements.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from rkconvert.tensors.formats import from_float32, to_float32
from rkconvert.tensors.weights import TensorInfo, Weights, row_blocks
from rkruntime.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray


# A product of thin matrices packs one of them first, of which parts with many rows pack little.
_COLUMNS: Final = 2304
# Each step of each part takes the interpreter lock once; larger ones take more memory than they save time.
_PART: Final = 1 << 17


class _Rooms(threading.local):
    """Two rooms for parts of blocks, of a thread: memory that is given back each time costs as much as a copy."""

    def __init__(self) -> None:
        self._room = np.empty((2, 0), np.float32)

    def of(self, rows: int, columns: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Both, in this shape."""
        size = rows * columns
        if self._room.shape[1] < size:
            self._room = np.empty((2, size), np.float32)
        one, other = self._room[:, :size].reshape(2, rows, columns)
        return one, other


_rooms: Final = _Rooms()


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a matrix's parts."""
    for left in range(0, shape[1], _COLUMNS):
        right = min(left + _COLUMNS, shape[1])
        for first, count in row_blocks((shape[0], right - left), _PART):
            yield slice(first, first + count), slice(left, right)


class Change(Protocol):
    """A change of a tensor's rows."""

    def apply(self, block: NDArray[Any], dtype: str, first: int) -> NDArray[Any]:
        """Return rows, starting at row `first` and stored in format `dtype`, after the change."""
        ...

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the change applies to a tensor of this shape."""
        ...


# Changes and replacements compare by identity: two tied tensors share one object.
@dataclass(frozen=True, eq=False)
class LowRank:
    """weight + scaling * (b @ a) with a [rank, in] and b [out, rank], float32.

    Attributes:
        round_delta: Whether the product is rounded to the weight's format before it is added (embeddings and MiCA).
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scaling: float
    round_delta: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that it changes, [out, in]."""
        return self.b.shape[0], self.a.shape[1]

    def same_as(self, other: LowRank) -> bool:
        """Whether both have the same matrices."""
        return np.array_equal(self.a, other.a) and np.array_equal(self.b, other.b)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Change.fits`."""
        return self.shape == shape

    def delta(self, first: int, part: tuple[slice, slice], out: NDArray[np.float32] | None = None) -> NDArray[Any]:
        """Return a part of scaling * (b @ a), whose rows are counted from `first`, into `out` if given."""
        rows, columns = part
        delta: NDArray[np.float32] = np.matmul(self.b[first:][rows], self.a[:, columns], out=out)
        if self.scaling != 1:
            delta *= np.float32(self.scaling)
        return delta

    def apply(self, block: NDArray[Any], dtype: str, first: int) -> NDArray[Any]:
        """See `Change.apply`."""
        merged = np.empty_like(block)
        for part in _parts(block.shape):
            old, new = block[part], merged[part]
            delta, room = _rooms.of(*old.shape)
            self.delta(first, part, delta)
            if self.round_delta:
                delta = to_float32(from_float32(delta, dtype, room=room), dtype, delta)
            delta += to_float32(old, dtype, room)
            from_float32(delta, dtype, new, room)
        return merged


@dataclass(frozen=True, eq=False)
class Dora:
    """DoRA: (weight + scaling * (b @ a)) * magnitude / norm of each row.

    Norms are summed in float64 here, but in float32 and its own order in torch: a float32 result can differ from peft's
    by a few units in the last place.
    """

    low_rank: LowRank
    magnitude: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that it changes, [out, in]."""
        return self.low_rank.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Change.fits`."""
        return self.shape == shape

    def apply(self, block: NDArray[Any], dtype: str, first: int) -> NDArray[Any]:
        """See `Change.apply`."""
        rows = self.low_rank.delta(first, (slice(0, len(block)), slice(None)))
        rows += to_float32(block, dtype)
        norm = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)).astype(np.float32)
        if not norm.all():
            raise AdapterError("The adapter's DoRA norms have a row of zeros, which cannot be divided by.")
        rows *= (self.magnitude[first : first + len(block)] / norm)[:, None]
        return from_float32(rows, dtype)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Single rows of an embedding that replace the base's (trainable_token_indices)."""

    rows: Mapping[int, NDArray[np.float32]]

    def same_as(self, other: TokenRows) -> bool:
        """Whether the same tokens get the same rows."""
        rows = other.rows
        return self.rows.keys() == rows.keys() and all(np.array_equal(row, rows[at]) for at, row in self.rows.items())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Change.fits`."""
        return all(0 <= index < shape[0] and row.shape == shape[1:] for index, row in self.rows.items())

    def apply(self, block: NDArray[Any], dtype: str, first: int) -> NDArray[Any]:
        """See `Change.apply`."""
        block = block.copy()
        for index, row in self.rows.items():
            if first <= index < first + len(block):
                block[index - first] = from_float32(row, dtype)
        return block


@dataclass(frozen=True, eq=False)
class Replacement:
    """A whole tensor from the adapter's file, which replaces the base's.

    Attributes:
        trained: Whether the adapter trained it (modules_to_save). Else it is the base's own tensor as seen in training,
            which peft saves beside a LoRA on an embedding and when the vocabulary grew.
    """

    source: Weights = field(repr=False)
    name: str
    trained: bool

    @property
    def info(self) -> TensorInfo:
        """Format and shape as saved."""
        return self.source.tensors[self.name]

    def read(self, first: int, count: int, dtype: str) -> NDArray[Any]:
        """Return rows in the format `dtype`."""
        own = self.source.read(self.name, first, count)
        saved = self.info.dtype
        return own if saved == dtype else from_float32(to_float32(own, saved), dtype)


@dataclass(frozen=True)
class TensorUpdate:
    """All changes to one tensor: an optional replacement, then changes."""

    replacement: Replacement | None = None
    changes: tuple[Change, ...] = ()
