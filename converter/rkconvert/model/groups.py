"""Group sizes that the toolkit can make for a model's matrices.

The manuals say that a group must divide the output size of each linear layer. The vendor's own TinyLLAMA 1.1B with
w8a8_g512 has matrices with 256 outputs, so that a group may lie along the inputs instead. A type is said not to fit a
model only if it fits neither way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rkconvert.model.shapes import Matrix, ModelShape
from rkconvert.rules.type_names import QuantizedType

SOURCE: Final = (
    "https://github.com/airockchip/rknn-llm: manuals 1.1.4 p.15 to 1.3.0 p.16, and the figures in README.md of 1.1.1"
)
_SIZES: Final = {"w8a8": (512, 256, 128), "w4a16": (128, 64, 32)}


@dataclass(frozen=True)
class Misfit:
    """A type that does not fit a model, with the first matrices that show it.

    Attributes:
        fits: The type with the largest group that fits, or `none`.
    """

    kind: QuantizedType
    outputs: Matrix
    inputs: Matrix
    fits: str

    @property
    def sentence(self) -> str:
        """Why the type does not fit the model."""
        return (
            f"{self.kind.name} needs sizes that are multiples of {self.kind.group}, but {self.outputs.name} has"
            f" {self.outputs.rows} outputs and {self.inputs.name} {self.inputs.columns} inputs"
        )


def misfit(shape: ModelShape, kind: QuantizedType) -> Misfit | None:
    """Return why a grouped type does not fit; None if it does, and for a type without groups."""
    if not kind.group:
        return None
    broken = _broken(shape, kind.group)
    if broken is None:
        return None
    sizes = (size for size in _SIZES.get(kind.ungrouped.name, ()) if _broken(shape, size) is None)
    return Misfit(kind, *broken, next((kind.grouped(size).name for size in sizes), "none"))


def _broken(shape: ModelShape, group: int) -> tuple[Matrix, Matrix] | None:
    """Return the first matrix whose outputs, and the first whose inputs, do not fit the group, if there are both."""
    matrices = (*shape.layer, shape.head)
    outputs = next((matrix for matrix in matrices if matrix.rows % group), None)
    inputs = next((matrix for matrix in matrices if matrix.columns % group), None)
    return (outputs, inputs) if outputs and inputs else None
