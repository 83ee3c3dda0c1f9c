"""Parse names of quantized types: `w8a8_g128` has 8-bit weights and activations, with 128 weights per scale."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from rkruntime.errors import UsageError

# To the toolkit this is not a type, but its argument do_quantization.
UNQUANTIZED: Final = "fp16"
_NAME: Final = re.compile(r"w(?P<weights>\d+)a(?P<activations>\d+)(?:_g(?P<group>[1-9]\d*))?")


@dataclass(frozen=True)
class QuantizedType:
    """A type by its name.

    Attributes:
        bits: Bits of a weight.
        activation_bits: Bits of an activation.
        group: Weights that share a scale; 0 for one scale per output channel.
    """

    name: str
    bits: int
    activation_bits: int
    group: int

    @property
    def ungrouped(self) -> QuantizedType:
        """The same type with one scale per output channel."""
        return QuantizedType(self.name.partition("_g")[0], self.bits, self.activation_bits, 0)

    def grouped(self, size: int) -> QuantizedType:
        """Return the same type with one scale per `size` weights."""
        return QuantizedType(f"{self.ungrouped.name}_g{size}", self.bits, self.activation_bits, size)


def parse_type(name: str) -> QuantizedType:
    """Parse a name. Raises UsageError if it is malformed."""
    if name == UNQUANTIZED:
        return QuantizedType(name, 16, 16, 0)
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} is not a quantized type.", hint="Types look like w8a8, w8a8_g128, w4a16 or fp16.")
    return QuantizedType(name, int(match["weights"]), int(match["activations"]), int(match["group"] or 0))
