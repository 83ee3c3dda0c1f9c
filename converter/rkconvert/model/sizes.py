"""Sizes in bytes of a model's parts in each quantized type."""

from __future__ import annotations

from typing import Final

from rkconvert.model.shapes import Matrix, ModelShape
from rkconvert.rules.type_names import UNQUANTIZED, QuantizedType

# Bytes of a scale: float32, one per output channel or group.
SCALE_BYTES: Final = 4
# Bytes of a float16, as in the file's embedding table and a board's keys and values.
HALF_BYTES: Final = 2
# Bytes of a weight of the embedding table in RAM.
_TABLE_BYTES: Final = 4


def matrix_bytes(matrix: Matrix, kind: QuantizedType) -> float:
    """Return the size of one matrix's weights and scales."""
    weights = matrix.weights * kind.bits / 8
    if kind.name == UNQUANTIZED:
        return weights
    return weights + SCALE_BYTES * (matrix.weights / kind.group if kind.group else matrix.rows)


def scale_groups(shape: ModelShape, kind: QuantizedType) -> float:
    """Return the number of groups in all matrices that the NPU reads; 0 for ungrouped types."""
    return npu_weights(shape) / kind.group if kind.group else 0.0


def npu_weights(shape: ModelShape) -> int:
    """Return the weights read for each token: all layers and the head, but only one row of the embedding."""
    return shape.num_hidden_layers * shape.layer_weights + shape.head.weights


def npu_bytes(shape: ModelShape, kind: QuantizedType) -> float:
    """Return the size of weights and scales in NPU memory."""
    layer = sum(matrix_bytes(matrix, kind) for matrix in shape.layer)
    return shape.num_hidden_layers * layer + matrix_bytes(shape.head, kind)


def embedding_bytes(shape: ModelShape) -> int:
    """Return the size of the embedding table in the file."""
    return shape.head.weights * HALF_BYTES


def table_bytes(shape: ModelShape) -> int:
    """Return the size of the embedding table in RAM: float32.

    The vendor's peak memory for 1.1.0, which has no embed_flash, is that of 1.2.1 plus 4 bytes for each weight of the
    table, within 3.5 % for seven models; with 2 bytes it would be up to 7 % too low. Whether later releases use less
    for a table in RAM is not published.
    """
    return shape.head.weights * _TABLE_BYTES


def file_bytes(shape: ModelShape, kind: QuantizedType) -> float:
    """Return the size of the .rkllm file, without tokenizer and NPU program.

    The layout follows public descriptions of the container: quantized matrices, the embedding in
    plain float16, norms and biases in float32.
    """
    return npu_bytes(shape, kind) + embedding_bytes(shape) + shape.vectors * 4


def cache_bytes_per_token(shape: ModelShape) -> int:
    """Return the size of one token's keys and values in all layers.

    A sliding window saves nothing here: no release is known to keep less for such layers.
    """
    return shape.num_hidden_layers * shape.kv_width * HALF_BYTES
