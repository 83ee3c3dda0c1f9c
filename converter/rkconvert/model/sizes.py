"""How many bytes a model's parts take in each quantized type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from rkconvert.model.shapes import Matrix, ModelShape
from rkruntime.errors import UsageError

# float32, one for each output channel or group.
SCALE_BYTES: Final = 4
# The file holds the embedding table, and a board computes keys and values, in float16.
HALF_BYTES: Final = 2
# One weight of the embedding table in RAM.
_TABLE_BYTES: Final = 4
_TYPE: Final = re.compile(r"w(?P<bits>\d+)a\d+(?:_g(?P<group>\d+))?")


@dataclass(frozen=True)
class QuantizedType:
    """A type by its name: `w8a8_g128` has 8 bits for each weight and a scale for each 128 of them.

    Attributes:
        group: weights that share a scale; 0 for one scale for each output channel.
    """

    name: str
    bits: int
    group: int

    def matrix_bytes(self, matrix: Matrix) -> float:
        """Weights and scales of one matrix."""
        if self.bits == 16:
            return matrix.weights * HALF_BYTES
        scales = matrix.weights / self.group if self.group else matrix.rows
        return matrix.weights * self.bits / 8 + scales * SCALE_BYTES

    @property
    def ungrouped(self) -> QuantizedType:
        """The same type with one scale for each output channel."""
        return QuantizedType(self.name.partition("_g")[0], self.bits, 0)

    def groups(self, shape: ModelShape) -> float:
        """Number of groups in all matrices that the NPU reads."""
        return npu_weights(shape) / self.group if self.group else 0.0


def parse_type(name: str) -> QuantizedType:
    """The type of that name; UsageError if the name has another form."""
    if name == "fp16":
        return QuantizedType(name, 16, 0)
    match = _TYPE.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} is not a quantized type.", hint="Types look like w8a8, w8a8_g128, w4a16 or fp16.")
    return QuantizedType(name, int(match["bits"]), int(match["group"] or 0))


def npu_weights(shape: ModelShape) -> int:
    """Weights that are read for each token: all layers and the head, but of the embedding a single row."""
    return shape.num_hidden_layers * shape.layer_weights + shape.head.weights


def npu_bytes(shape: ModelShape, kind: QuantizedType) -> float:
    """Bytes of weights and scales in the NPU's memory."""
    layer = sum(kind.matrix_bytes(matrix) for matrix in shape.layer)
    return shape.num_hidden_layers * layer + kind.matrix_bytes(shape.head)


def embedding_bytes(shape: ModelShape) -> int:
    """Bytes of the table that token ids are looked up in, as the file holds it."""
    return shape.head.weights * HALF_BYTES


def table_bytes(shape: ModelShape) -> int:
    """Bytes that this table takes in RAM: float32.

    The vendor's peaks of memory for 1.1.0, which has no embed_flash, are those of 1.2.1 and 4 bytes for each weight of
    the table, within 3.5 % for seven models; with 2 bytes they are up to 7 % too low. Whether later releases take less
    for a table in RAM is not published.
    """
    return shape.head.weights * _TABLE_BYTES


def file_bytes(shape: ModelShape, kind: QuantizedType) -> float:
    """Size of the .rkllm file, without tokenizer and NPU program.

    Raises nothing; the layout is that of public descriptions of the container: quantized matrices, the embedding in
    plain float16, norms and biases in float32.
    """
    return npu_bytes(shape, kind) + embedding_bytes(shape) + shape.vectors * 4


def cache_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of one token in all layers.

    A sliding window saves nothing here: no release is known to keep less for such layers.
    """
    return shape.num_hidden_layers * shape.kv_width * HALF_BYTES
