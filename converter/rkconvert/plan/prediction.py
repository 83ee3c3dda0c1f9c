"""Speed and memory of a model on a board, predicted from bytes and bandwidth.

A decoded token reads every weight once, so its time is bytes over bandwidth, plus a fixed time for each layer in which
the NPU is started. A prompt is bound by arithmetic: a time for each weight and each layer. The process holds the
weights, the cache, and memory for its vocabulary and code. The few constants are fitted to the vendor's own figures
(data/vendor_benchmarks.csv), for each SoC and release; nothing here was measured on a board by this project.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import yaml

from rkconvert.model.shapes import ModelShape, parse_shape
from rkconvert.model.sizes import cache_bytes_per_token, npu_bytes, scale_groups, table_bytes
from rkconvert.rules.type_names import QuantizedType, parse_type
from rkruntime.abi import since
from rkruntime.versions import version

MIB: Final = 1 << 20
# Tokens in the vendor's measurements, and so in a plain prediction.
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 64
# The first release that can leave the embedding table in the file.
FLASH_SINCE: Final = since("RKLLMExtendParam.embed_flash")
_DATA: Final = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Benchmark:
    """A row of the vendor's table.

    Attributes:
        ttft_ms: Time to the first token, in ms.
        memory_mb: Peak memory of the process in MiB; before 1.2.0 with the embedding table.
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
        """Time per decoded token, in ms."""
        return 1000 / self.decode_tokens_per_s

    @property
    def prompt_ms(self) -> float:
        """Time to the first token after PROMPT_TOKENS, in ms; roughly linear (Gemma2 2B: 64 in 342 ms, 128 in 694)."""
        return self.ttft_ms * PROMPT_TOKENS / self.prompt_tokens

    @property
    def decoded_at(self) -> float:
        """Mean number of tokens in the cache while the vendor's run decodes."""
        return self.prompt_tokens + self.new_tokens / 2

    @property
    def held_bytes(self) -> float:
        """Bytes that the process certainly holds: weights and scales, cache, and before 1.2.0 the embedding table."""
        return _held_bytes(self.shape, self.kind, self.prompt_tokens + self.new_tokens, not has_flash(self.release))


def _held_bytes(shape: ModelShape, kind: QuantizedType, tokens: float, table: bool) -> float:
    return npu_bytes(shape, kind) + tokens * cache_bytes_per_token(shape) + (table_bytes(shape) if table else 0)


def has_flash(release: str) -> bool:
    """Whether a release can leave the embedding table in the model file."""
    return version(release) >= version(FLASH_SINCE)


@dataclass(frozen=True)
class Prediction:
    """Expected speed and memory of a model on a SoC.

    Attributes:
        ttft_ms: For a prompt of PROMPT_TOKENS.
        memory_mb: Peak memory of the process in MiB after NEW_TOKENS more, as the vendor measures.
    """

    ttft_ms: float
    decode_tokens_per_s: float
    memory_mb: float


@dataclass(frozen=True)
class Costs:
    """Constants of one SoC and release. Mappings are by bits per weight: not every SoC has rows for every width.

    Attributes:
        release: Release to whose figures they are fitted.
        byte_ms: Time to read one byte of weights, while decoding.
        layer_ms: Time per layer, while decoding.
        prefill_weight_ms, prefill_layer_ms: The same for a prompt of PROMPT_TOKENS, but per weight.
        fixed_bytes, vocabulary_bytes: Memory besides weights and cache; the latter per token of the vocabulary.
        group_ms, prefill_group_ms, group_bytes: Cost of one group of a grouped type.
    """

    release: str
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
        """Gigabytes (1e9) of weights that the NPU reads per second, for the widest type that has figures."""
        return 1e-6 / self.byte_ms[max(self.byte_ms)]

    def token_ms(self, shape: ModelShape, kind: QuantizedType, tokens: float) -> float:
        """Return the time of a decoded token with `tokens` in the cache, in ms."""
        # A group's cost is fitted as a whole, so its scales must not be counted twice.
        read = npu_bytes(shape, kind.ungrouped) + tokens * cache_bytes_per_token(shape)
        # float16 uses the time per byte of 8-bit weights.
        return (
            read * self.byte_ms[min(kind.bits, 8)]
            + shape.num_hidden_layers * self.layer_ms
            + scale_groups(shape, kind) * self.group_ms
        )

    def prompt_ms(self, shape: ModelShape, kind: QuantizedType) -> float:
        """Return the time to the first token after a prompt of PROMPT_TOKENS, in ms."""
        weights = shape.num_hidden_layers * shape.layer_weights
        per_weight = self.prefill_weight_ms[min(kind.bits, 8)] * max(kind.bits / 8, 1)
        layers = shape.num_hidden_layers * self.prefill_layer_ms
        return weights * per_weight + layers + scale_groups(shape, kind) * self.prefill_group_ms

    def memory_bytes(self, shape: ModelShape, kind: QuantizedType, tokens: float, table: bool) -> float:
        """Return the peak memory with `tokens` in the cache, in bytes; `table`: whether the embedding table is in RAM.

        Never less than weights with scales, cache and table, which the process certainly holds: a fitted cost of a
        group may be smaller than its scale, and some of the vendor's figures are smaller than that sum.
        """
        return max(_held_bytes(shape, kind, tokens, table), self._fitted_bytes(shape, kind, tokens, table))

    def _fitted_bytes(self, shape: ModelShape, kind: QuantizedType, tokens: float, table: bool) -> float:
        grouped = (scale_groups(shape, kind) * self.group_bytes) + npu_bytes(shape, kind.ungrouped)
        other = self.fixed_bytes + shape.vocab_size * self.vocabulary_bytes
        return grouped + tokens * cache_bytes_per_token(shape) + other + (table_bytes(shape) if table else 0)

    def corrected(self, row: Benchmark) -> Costs:
        """Return the same constants, shifted to reproduce the vendor's own figures for the model of `row`."""
        speed = row.token_ms / self.token_ms(row.shape, row.kind, row.decoded_at)
        prompt = row.prompt_ms / self.prompt_ms(row.shape, row.kind)
        tokens = row.prompt_tokens + row.new_tokens
        held = self._fitted_bytes(row.shape, row.kind, tokens, not has_flash(row.release))
        return replace(
            self,
            byte_ms={bits: speed * value for bits, value in self.byte_ms.items()},
            layer_ms=speed * self.layer_ms,
            group_ms=speed * self.group_ms,
            prefill_weight_ms={bits: prompt * value for bits, value in self.prefill_weight_ms.items()},
            prefill_layer_ms=prompt * self.prefill_layer_ms,
            prefill_group_ms=prompt * self.prefill_group_ms,
            fixed_bytes=self.fixed_bytes + row.memory_mb * MIB - held,
        )

    def predict(self, shape: ModelShape, kind: QuantizedType, table: bool) -> Prediction:
        """Predict the figures in the vendor's table."""
        return Prediction(
            ttft_ms=self.prompt_ms(shape, kind),
            decode_tokens_per_s=1000 / self.token_ms(shape, kind, PROMPT_TOKENS + NEW_TOKENS / 2),
            memory_mb=self.memory_bytes(shape, kind, PROMPT_TOKENS + NEW_TOKENS, table) / MIB,
        )


@cache
def vendor_rows() -> tuple[Benchmark, ...]:
    """Read the vendor's table."""
    models = yaml.safe_load((_DATA / "models.yaml").read_text("utf-8"))
    shapes = {name: parse_shape(model["config"]) for name, model in models.items()}
    lines = (_DATA / "vendor_benchmarks.csv").read_text("utf-8").splitlines()
    return tuple(_row(line, shapes) for line in csv.DictReader(line for line in lines if not line.startswith("#")))


def _row(line: Mapping[str, str], shapes: Mapping[str, ModelShape]) -> Benchmark:
    return Benchmark(
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


def nearest(releases: Iterable[str], wanted: str) -> str:
    """Return the newest of some releases that is not newer than the wanted one; if all are newer, the oldest."""
    ordered = sorted(releases, key=version)
    return next((item for item in reversed(ordered) if version(item) <= version(wanted)), ordered[0])


@cache
def costs_of(platform: str, kind: QuantizedType, release: str) -> Costs:
    """Return the constants for a type on a SoC with a release, or the nearest release with vendor figures.

    Raises:
        KeyError: The vendor has no figures for that SoC, or for weights of that width on it.
    """
    return _costs(vendor_rows(), platform, kind, release)


@cache
def own_rows(platform: str, kind: QuantizedType, shape: ModelShape) -> Mapping[str, Benchmark]:
    """Return the vendor's figures for models that differ from this one only in their weights, by release."""
    return {
        row.release: row
        for row in vendor_rows()
        if (row.platform, row.kind) == (platform, kind)
        and (row.shape.family, row.shape.num_hidden_layers) == (shape.family, shape.num_hidden_layers)
        and (row.shape.layer, row.shape.head, row.shape.kv_width) == (shape.layer, shape.head, shape.kv_width)
    }


@cache
def costs_for(platform: str, kind: QuantizedType, release: str, shape: ModelShape) -> Costs:
    """Return the constants of `costs_of`, shifted to the vendor's own figures for this model if there are any."""
    costs = costs_of(platform, kind, release)
    rows = own_rows(platform, kind, shape), own_rows(platform, kind.ungrouped, shape)
    own = next((found[costs.release] for found in rows if costs.release in found), None)
    return costs.corrected(own) if own else costs


def _costs(rows: Sequence[Benchmark], platform: str, kind: QuantizedType, release: str) -> Costs:
    bits = min(kind.bits, 8)
    here = [row for row in rows if row.platform == platform]
    plain = {row.release for row in here if row.kind.bits == bits and not row.kind.group}
    if not plain:
        raise KeyError(platform, kind.name)
    return fit(here, nearest(plain, release))


def fit(rows: Sequence[Benchmark], release: str) -> Costs:
    """Fit constants by least squares of the relative errors over a SoC's rows of a release.

    The cost of a group is taken from the nearest release with figures for grouped types.
    """
    plain = [row for row in rows if row.release == release and not row.kind.group]
    widths = sorted({row.kind.bits for row in plain})

    def by_width(row: Benchmark, value: float) -> list[float]:
        return [value if row.kind.bits == bits else 0.0 for bits in widths]

    layers = [float(row.shape.num_hidden_layers) for row in plain]
    reads = [npu_bytes(row.shape, row.kind) + row.decoded_at * cache_bytes_per_token(row.shape) for row in plain]
    *byte_ms, layer_ms = _least_squares(
        [[*by_width(row, read), count] for row, read, count in zip(plain, reads, layers, strict=True)],
        [row.token_ms for row in plain],
    )
    *weight_ms, prefill_layer_ms = _least_squares(
        [[*by_width(row, count * row.shape.layer_weights), count] for row, count in zip(plain, layers, strict=True)],
        [row.prompt_ms for row in plain],
    )
    fixed, vocabulary = _least_squares(
        [[1.0, float(row.shape.vocab_size)] for row in plain],
        [row.memory_mb * MIB for row in plain],
        known=[row.held_bytes for row in plain],
    )
    pairs = _pairs(rows, release)
    return Costs(
        release=release,
        byte_ms=dict(zip(widths, byte_ms, strict=True)),
        layer_ms=layer_ms,
        prefill_weight_ms=dict(zip(widths, weight_ms, strict=True)),
        prefill_layer_ms=prefill_layer_ms,
        fixed_bytes=fixed,
        vocabulary_bytes=vocabulary,
        group_ms=_per_group(pairs, lambda row: row.token_ms),
        prefill_group_ms=_per_group(pairs, lambda row: row.prompt_ms),
        group_bytes=_per_group(pairs, lambda row: row.memory_mb * MIB),
    )


def _least_squares(
    factors: Sequence[Sequence[float]], measured: Sequence[float], known: Iterable[float] | None = None
) -> list[float]:
    """Return coefficients c >= 0 with known + factors @ c close to `measured`, each row weighted by 1 / measured."""
    target = np.array(measured)
    rest = target - np.array(list(known)) if known is not None else target
    matrix = np.array(factors) / target[:, None]
    kept = list(range(matrix.shape[1]))
    while True:
        solution = np.linalg.lstsq(matrix[:, kept], rest / target, rcond=None)[0]
        # No part of a time or size is negative: drop the negative one, and fit the others again.
        if len(kept) == 1 or solution.min() >= 0:
            break
        del kept[int(solution.argmin())]
    found = dict(zip(kept, solution, strict=True))
    return [float(found.get(column, 0.0)) for column in range(matrix.shape[1])]


def _pairs(rows: Sequence[Benchmark], release: str) -> list[tuple[Benchmark, Benchmark]]:
    """Return pairs of rows that differ only in grouping, plain first, of the nearest release that has any."""
    plain = {(row.model, row.release, row.kind.bits): row for row in rows if not row.kind.group}
    pairs = [
        (partner, row)
        for row in rows
        if row.kind.group and (partner := plain.get((row.model, row.release, row.kind.bits)))
    ]
    if not pairs:
        return []
    of = nearest({row.release for row, _ in pairs}, release)
    return [pair for pair in pairs if pair[0].release == of]


def _per_group(pairs: Sequence[tuple[Benchmark, Benchmark]], figure: Callable[[Benchmark], float]) -> float:
    """Return the cost of a group in a figure: the median over the pairs, so that one outlier does not shift it."""
    costs = [(figure(grouped) - figure(plain)) / scale_groups(grouped.shape, grouped.kind) for plain, grouped in pairs]
    return max(0.0, median(costs)) if costs else 0.0


@dataclass(frozen=True)
class Accuracy:
    """Relative errors when each vendor model is predicted from all others: mean, largest and count."""

    rows: int
    mean: float
    largest: float


@cache
def accuracy(platform: str, kind: QuantizedType, release: str) -> Mapping[str, Accuracy]:
    """Return errors by figure of a Prediction, for a type and release with vendor figures; empty below three rows."""
    rows = [row for row in vendor_rows() if (row.platform, row.kind, row.release) == (platform, kind, release)]
    if len(rows) < 3:
        return {}
    errors: dict[str, list[float]] = {"decode_tokens_per_s": [], "ttft_ms": [], "memory_mb": []}
    for row in rows:
        costs = _costs([other for other in vendor_rows() if other.model != row.model], platform, kind, release)
        tokens = row.prompt_tokens + row.new_tokens
        memory = costs.memory_bytes(row.shape, kind, tokens, not has_flash(release))
        errors["decode_tokens_per_s"].append(row.token_ms / costs.token_ms(row.shape, kind, row.decoded_at) - 1)
        errors["ttft_ms"].append(costs.prompt_ms(row.shape, kind) / row.prompt_ms - 1)
        errors["memory_mb"].append(memory / (row.memory_mb * MIB) - 1)
    return {
        figure: Accuracy(len(rows), sum(map(abs, found)) / len(rows), max(map(abs, found)))
        for figure, found in errors.items()
    }
