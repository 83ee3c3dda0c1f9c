"""Layout of a model in NPU memory: domains of 4 GiB; a buffer must fit into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from rkconvert.model.shapes import ModelShape
from rkconvert.model.sizes import cache_bytes_per_token, matrix_bytes
from rkconvert.rules.quantized_types import DOMAIN_BYTES
from rkconvert.rules.type_names import QuantizedType

# Version 0.9.8 of the rknpu driver has domains 0 to 15.
MOST_DOMAINS: Final = 16


@dataclass
class Domain:
    """One domain: bytes of each part in it."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def used(self) -> float:
        """Bytes in use."""
        return sum(self.parts.values())

    def add(self, part: str, size: float) -> None:
        """Add a buffer of a part."""
        self.parts[part] = self.parts.get(part, 0.0) + size


def place(shape: ModelShape, kind: QuantizedType, context: int) -> list[Domain]:
    """Fill domains in layer order, starting a new one when the next buffer does not fit.

    Where the runtime really places buffers is not published; this order needs as few domains as possible, apart from
    the space left at the end of each.
    """
    domains = [Domain()]
    for part, size in _buffers(shape, kind, context):
        if domains[-1].used + size > DOMAIN_BYTES:
            domains.append(Domain())
        domains[-1].add(part, size)
    return domains


def _buffers(shape: ModelShape, kind: QuantizedType, context: int) -> Iterator[tuple[str, float]]:
    cache = context * cache_bytes_per_token(shape) / shape.num_hidden_layers
    matrices = [matrix_bytes(matrix, kind) for matrix in shape.layer]
    for _ in range(shape.num_hidden_layers):
        for size in matrices:
            yield "layers", size
        yield "cache", cache
    yield "head", matrix_bytes(shape.head, kind)
