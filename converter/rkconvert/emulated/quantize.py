"""Symmetric int8 quantization of weights, per row or per group along a row.

The scale of a row (or group) is its largest magnitude / 127; values are rounded to nearest, ties to even. This is the
scheme that the emulator computes with; what the vendor's toolkit does internally is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rkconvert.rules.type_names import parse_type
from rkconvert.tensors.weights import CACHE_WEIGHTS, row_blocks
from rkruntime.errors import RefusedError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def group_size(dtype: str, width: int) -> int:
    """Return the number of weights that share a scale in rows of `width`: all of them for `w8a8`, N for `w8a8_gN`.

    Raises:
        RefusedError: The group size does not divide the row.
    """
    size = parse_type(dtype).group or width
    if width % size:
        raise RefusedError(
            f"{dtype} needs rows whose length is a multiple of {size}; this model has rows of {width} weights.",
            hint="Use w8a8, or a smaller group.",
        )
    return size


def quantize_rows(rows: NDArray[np.float32], group: int, bits: int = 8) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize rows [n, width]; returns values as int8 [n, width] and scales as float32 [n, width / group].

    A group of zeros has scale 0.

    Args:
        bits: Bits of a value, from 2 to 8; the emulator uses 8.
    """
    most = np.float32((1 << bits - 1) - 1)
    values = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), rows.shape[1] // group), np.float32)
    blocks = list(row_blocks(rows.shape, CACHE_WEIGHTS))
    # One buffer for all blocks: the allocator would return one of this size to the kernel, and map it anew each time.
    room = np.empty((blocks[0][1] if blocks else 0, rows.shape[1] // group, group), np.float32)
    for first, count in blocks:
        groups = rows[first : first + count].reshape(count, -1, group)
        scale = np.maximum(groups.max(axis=2), -groups.min(axis=2)) / most
        # Dividing by the smallest floats would give infinity; such a group is zero for all purposes.
        divisor = np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(np.inf))
        steps = np.divide(groups, divisor[:, :, None], out=room[:count])
        np.rint(steps, out=steps)
        values[first : first + count] = steps.reshape(count, -1)
        scales[first : first + count] = scale
    return values, scales
