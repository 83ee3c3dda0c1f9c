"""Speed and memory of a model on a board, predicted from bytes and bandwidth.

A decoded token reads every weight once, so its time is bytes over bandwidth, and a fixed time for each layer in which
the NPU is started. A prompt is bound by arithmetic: a time for each weight and each layer. The process holds the
weights, the cache, and what its vocabulary and its code take. The few constants are fitted to the vendor's own figures
(data/vendor_benchmarks.csv), for each SoC; nothing here was measured on a board by this project.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import yaml

from rkconvert.plan.sizes import QuantizedType, cache_bytes_per_token, npu_bytes, parse_type
from rkconvert.shapes import ModelShape, parse_shape

MIB: Final = 1 << 20
# What the vendor's rows were taken with, and so what a plain prediction is for.
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 64
_RELEASE: Final = "1.3.0"
_DATA: Final = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Row:
    """A line of the vendor's table.

    Attributes:
        ttft_ms: time to the first token.
        memory_mb: peak of the process in MiB.
    """

    platform: str
    model: str
    shape: ModelShape
    kind: QuantizedType
    release: str
    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    decode_tokens_per_s: float
    memory_mb: float

    @property
    def token_ms(self) -> float:
        """Time of one decoded token."""
        return 1000 / self.decode_tokens_per_s


@dataclass(frozen=True)
class Prediction:
    """What is expected of a model on a SoC.

    Attributes:
        ttft_ms: for a prompt of PROMPT_TOKENS.
        memory_mb: peak of the process in MiB after NEW_TOKENS more, embedding table not in RAM; as the vendor measures.
    """

    ttft_ms: float
    decode_tokens_per_s: float
    memory_mb: float


@dataclass(frozen=True)
class Costs:
    """The constants of one SoC. Mappings are by bits of a weight: not every SoC has rows for every width.

    Attributes:
        byte_ms: reading one byte of weights, while decoding.
        layer_ms: one layer, while decoding.
        prefill_weight_ms, prefill_layer_ms: the same for a prompt of PROMPT_TOKENS, for each weight.
        fixed_bytes, vocabulary_bytes: memory besides weights and cache; the latter for each token of the vocabulary.
        group_ms, prefill_group_ms, group_bytes: what one group of a grouped type adds.
    """

    byte_ms: Mapping[int, float]
    layer_ms: float
    prefill_weight_ms: Mapping[int, float]
    prefill_layer_ms: float
    fixed_bytes: float
    vocabulary_bytes: float
    group_ms: float
    prefill_group_ms: float
    group_bytes: float

    @property
    def bandwidth_gb_per_s(self) -> float:
        """Bytes of 8-bit weights that the NPU reads in a second, in 1e9."""
        return 1e-6 / self.byte_ms[8]

    def knows(self, kind: QuantizedType) -> bool:
        """Whether there is any row to predict this type from; float16 goes by the bytes of 8-bit weights."""
        return kind.bits in self.byte_ms or kind.bits == 16

    def token_ms(self, shape: ModelShape, kind: QuantizedType, tokens: float) -> float:
        """Time of a decoded token with `tokens` in the cache."""
        read = npu_bytes(shape, _ungrouped(kind)) + tokens * cache_bytes_per_token(shape)
        byte_ms = self.byte_ms.get(kind.bits, self.byte_ms[8])
        return read * byte_ms + shape.num_hidden_layers * self.layer_ms + kind.groups(shape) * self.group_ms

    def prompt_ms(self, shape: ModelShape, kind: QuantizedType) -> float:
        """Time to the first token of a prompt of PROMPT_TOKENS."""
        weights = shape.num_hidden_layers * shape.layer_weights
        per_weight = self.prefill_weight_ms.get(kind.bits, 2 * self.prefill_weight_ms[8])
        layers = shape.num_hidden_layers * self.prefill_layer_ms
        return weights * per_weight + layers + kind.groups(shape) * self.prefill_group_ms

    def memory_bytes(self, shape: ModelShape, kind: QuantizedType, tokens: int) -> float:
        """Peak of the process with `tokens` in the cache and the embedding table not in RAM."""
        weights = npu_bytes(shape, _ungrouped(kind)) + kind.groups(shape) * self.group_bytes
        held = tokens * cache_bytes_per_token(shape)
        return weights + held + self.fixed_bytes + shape.vocab_size * self.vocabulary_bytes

    def predict(self, shape: ModelShape, kind: QuantizedType) -> Prediction:
        """The figures that the vendor's table has."""
        return Prediction(
            ttft_ms=self.prompt_ms(shape, kind),
            decode_tokens_per_s=1000 / self.token_ms(shape, kind, PROMPT_TOKENS + NEW_TOKENS / 2),
            memory_mb=self.memory_bytes(shape, kind, PROMPT_TOKENS + NEW_TOKENS) / MIB,
        )


def _ungrouped(kind: QuantizedType) -> QuantizedType:
    """What a group costs is fitted as a whole, so its scales must not be counted twice."""
    return QuantizedType(kind.name, kind.bits, 0)


@cache
def vendor_rows() -> tuple[Row, ...]:
    """The vendor's table."""
    models = yaml.safe_load((_DATA / "models.yaml").read_text("utf-8"))
    shapes = {name: parse_shape(model["config"]) for name, model in models.items()}
    lines = (_DATA / "vendor_benchmarks.csv").read_text("utf-8").splitlines()
    return tuple(_row(line, shapes) for line in csv.DictReader(line for line in lines if not line.startswith("#")))


def _row(line: Mapping[str, str], shapes: Mapping[str, ModelShape]) -> Row:
    return Row(
        platform=line["platform"],
        model=line["model"],
        shape=shapes[line["model"]],
        kind=parse_type(line["type"]),
        release=line["release"],
        prompt_tokens=int(line["prompt_tokens"]),
        new_tokens=int(line["new_tokens"]),
        ttft_ms=float(line["ttft_ms"]),
        decode_tokens_per_s=float(line["decode_tokens_per_s"]),
        memory_mb=float(line["memory_mb"]),
    )


@cache
def costs_of(platform: str) -> Costs:
    """The constants of a SoC, from all of its rows; KeyError if it has none."""
    rows = [row for row in vendor_rows() if row.platform == platform]
    if not rows:
        raise KeyError(platform)
    return fit(rows)


def fit(rows: Sequence[Row]) -> Costs:
    """The constants that make the relative errors over the rows least, in the sense of squares."""
    plain = [row for row in rows if row.release == _RELEASE and not row.kind.group]
    widths = sorted({row.kind.bits for row in plain})

    def by_width(row: Row, value: float) -> list[float]:
        return [value if row.kind.bits == bits else 0.0 for bits in widths]

    def read_bytes(row: Row) -> float:
        tokens = row.prompt_tokens + row.new_tokens / 2
        return npu_bytes(row.shape, row.kind) + tokens * cache_bytes_per_token(row.shape)

    def layer_weights(row: Row) -> float:
        return row.shape.num_hidden_layers * row.shape.layer_weights

    def known_bytes(row: Row) -> float:
        tokens = row.prompt_tokens + row.new_tokens
        return npu_bytes(row.shape, row.kind) + tokens * cache_bytes_per_token(row.shape)

    layers = [float(row.shape.num_hidden_layers) for row in plain]
    *byte_ms, layer_ms = _least_squares(
        [[*by_width(row, read_bytes(row)), count] for row, count in zip(plain, layers, strict=True)],
        [row.token_ms for row in plain],
    )
    *weight_ms, prefill_layer_ms = _least_squares(
        [[*by_width(row, layer_weights(row)), count] for row, count in zip(plain, layers, strict=True)],
        [row.ttft_ms for row in plain],
    )
    fixed, vocabulary = _least_squares(
        [[1.0, float(row.shape.vocab_size)] for row in plain],
        [row.memory_mb * MIB for row in plain],
        known=[known_bytes(row) for row in plain],
    )
    return Costs(
        byte_ms=dict(zip(widths, byte_ms, strict=True)),
        layer_ms=layer_ms,
        prefill_weight_ms=dict(zip(widths, weight_ms, strict=True)),
        prefill_layer_ms=prefill_layer_ms,
        fixed_bytes=fixed,
        vocabulary_bytes=vocabulary,
        group_ms=_per_group(rows, lambda row: row.token_ms),
        prefill_group_ms=_per_group(rows, lambda row: row.ttft_ms * PROMPT_TOKENS / row.prompt_tokens),
        group_bytes=_per_group(rows, lambda row: row.memory_mb * MIB),
    )


def _least_squares(
    factors: Sequence[Sequence[float]], measured: Sequence[float], known: Iterable[float] | None = None
) -> list[float]:
    """Coefficients c with known + factors @ c close to `measured`, each row weighted by what was measured."""
    target = np.array(measured)
    rest = target - np.array(list(known)) if known is not None else target
    solution = np.linalg.lstsq(np.array(factors) / target[:, None], rest / target, rcond=None)[0]
    return [float(value) for value in solution]


def _per_group(rows: Sequence[Row], figure: Callable[[Row], float]) -> float:
    """What a group adds to a figure: the mean over pairs of rows that differ in nothing but the grouping."""
    plain = {(row.model, row.release, row.kind.bits): row for row in rows if not row.kind.group}
    costs = []
    for row in rows:
        partner = plain.get((row.model, row.release, row.kind.bits))
        if row.kind.group and partner is not None:
            costs.append((figure(row) - figure(partner)) / row.kind.groups(row.shape))
    return sum(costs) / len(costs) if costs else 0.0
