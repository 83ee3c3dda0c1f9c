"""The float model beside a copy with rounded weights and activations, in one pass over the weights.

It rounds what the emulator rounds: every matrix once, per row (or group), and the inputs of a matrix per token.
How a board rounds is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rkconvert.emulated.quantize import quantize_rows
from rkconvert.model.float_model import FloatModel
from rkconvert.rules.type_names import QuantizedType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Bits from which rounding is not worth computing.
_WIDE: Final = 16


@dataclass(frozen=True)
class RoundedToo(FloatModel):
    """A FloatModel whose `logits` are those of each prompt, then those of each prompt with everything rounded.

    Attributes:
        kind: The quantized type to round to; None rounds nothing.
    """

    kind: QuantizedType | None = None

    def logits(self, prompts: Sequence[Sequence[int]], last: int) -> list[Floats]:
        """See `FloatModel.logits`; twice as many arrays are returned."""
        return super().logits([*prompts, *prompts], last)

    def _embedded(self, prompts: Sequence[Sequence[int]]) -> Floats:
        rows = super()._embedded(prompts)
        plain, other = np.split(rows, 2)
        return np.vstack([plain, self._rounded_weights(other)])

    def _inputs(self, hidden: Floats) -> Floats:
        plain, other = np.split(hidden, 2)
        return np.vstack([plain, rounded(other, self.kind.activation_bits if self.kind else _WIDE, other.shape[1])])

    def _times(self, inputs: Floats, block: Floats) -> Floats:
        plain, other = np.split(inputs, 2)
        return np.vstack([plain @ block.T, other @ self._rounded_weights(block).T])

    def _rounded_weights(self, rows: Floats) -> Floats:
        if self.kind is None:
            return rows
        width, group = rows.shape[1], self.kind.group
        # The toolkit may take groups that do not divide a row; how it does is not known.
        return rounded(rows, self.kind.bits, group if group and not width % group else width)


def rounded(rows: Floats, bits: int, group: int) -> Floats:
    """Return rows [n, width] as quantization leaves them, with a scale for each `group` of a row."""
    if bits >= _WIDE:
        return rows
    values, scales = quantize_rows(rows, group, bits)
    groups = values.reshape(len(rows), -1, group) * scales[:, :, None]
    return groups.reshape(rows.shape)
