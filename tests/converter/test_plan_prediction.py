"""The prediction against the vendor's figures, each of a model that it was not fitted on."""

from __future__ import annotations

import pytest

from rkconvert.plan.prediction import Row, costs_of, fit, vendor_rows
from rkconvert.plan.sizes import cache_bytes_per_token, file_bytes, npu_bytes, parse_type
from rkconvert.shapes import parse_shape
from rkruntime.errors import UsageError

# 2112 MHz, twice a cycle, 64 bits: the memory clock that the vendor's figures were taken with.
DDR_GB_PER_S = 2112e6 * 2 * 8 / 1e9


def rows_of(platform: str, kind: str) -> list[Row]:
    rows = [row for row in vendor_rows() if (row.platform, row.kind.name, row.release) == (platform, kind, "1.3.0")]
    assert len(rows) >= 6
    return rows


def errors(platform: str, kind: str, figure: str) -> list[float]:
    """Relative errors, each model left out of the fit with all of its rows."""
    found = []
    for row in rows_of(platform, kind):
        others = [other for other in vendor_rows() if other.platform == platform and other.model != row.model]
        predicted = getattr(fit(others).predict(row.shape, row.kind), figure)
        found.append(abs(predicted / getattr(row, figure) - 1))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("platform", "kind", "figure", "least"),
    [
        ("rk3588", "w8a8", "decode_tokens_per_s", 0.06),
        ("rk3588", "w8a8", "memory_mb", 0.08),
        ("rk3588", "w8a8", "ttft_ms", 0.15),
        ("rk3576", "w8a8", "decode_tokens_per_s", 0.06),
        ("rk3576", "w8a8", "memory_mb", 0.08),
        ("rk3576", "w4a16", "decode_tokens_per_s", 0.06),
        ("rk3576", "w4a16", "memory_mb", 0.08),
        ("rk3576", "w4a16_g128", "decode_tokens_per_s", 0.06),
        ("rk3576", "w4a16_g128", "memory_mb", 0.08),
    ],
)
def test_a_model_left_out_is_predicted(platform, kind, figure, least):
    assert mean(errors(platform, kind, figure)) <= least


def test_no_single_row_is_far_off():
    assert max(errors("rk3588", "w8a8", "decode_tokens_per_s")) <= 0.06
    assert max(errors("rk3588", "w8a8", "memory_mb")) <= 0.08


def test_the_constants_are_physical():
    for platform in ("rk3588", "rk3576"):
        costs = costs_of(platform)
        assert costs.bandwidth_gb_per_s < DDR_GB_PER_S
        assert costs.layer_ms > 0
        assert costs.prefill_layer_ms > 0
        assert costs.fixed_bytes > 0
        assert costs.vocabulary_bytes > 0
        assert costs.group_ms > 0
        assert costs.group_bytes > 4  # at least the scale


def test_groups_cost_what_the_vendor_says():
    """w8a8_g128 runs at 57 % of the speed of w8a8 (Gemma2 2B, 1.1.0)."""
    costs = costs_of("rk3588")
    shape = next(row.shape for row in vendor_rows() if row.model == "Gemma2 2B")
    ratio = costs.token_ms(shape, parse_type("w8a8"), 0) / costs.token_ms(shape, parse_type("w8a8_g128"), 0)
    assert ratio == pytest.approx(0.57, abs=0.03)


def test_more_of_anything_is_slower_and_larger():
    config = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    }  # fmt: skip
    costs, kind = costs_of("rk3588"), parse_type("w8a8")
    base = costs.predict(parse_shape(config), kind)
    for change in ({"num_hidden_layers": 23}, {"vocab_size": 64000}, {"intermediate_size": 6000}):
        larger = costs.predict(parse_shape(config | change), kind)
        assert larger.decode_tokens_per_s < base.decode_tokens_per_s
        assert larger.memory_mb > base.memory_mb
        assert larger.ttft_ms >= base.ttft_ms


def test_sizes_by_hand():
    config = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    shape = parse_shape(config)
    matrices = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 512 * 256) + 1000 * 256
    rows = 2 * (256 + 128 + 128 + 256 + 512 + 512 + 256) + 1000
    assert npu_bytes(shape, parse_type("w8a8")) == matrices + 4 * rows
    assert npu_bytes(shape, parse_type("w4a16")) == matrices / 2 + 4 * rows
    assert npu_bytes(shape, parse_type("w8a8_g128")) == matrices + 4 * matrices / 128
    assert npu_bytes(shape, parse_type("fp16")) == 2 * matrices
    assert file_bytes(shape, parse_type("fp16")) == 2 * matrices + 2 * 1000 * 256 + 4 * 5 * 256
    assert cache_bytes_per_token(shape) == 2 * 2 * 128 * 2


@pytest.mark.parametrize("name", ["", "int8", "w8", "w8a8_g", "w8a8-g128", "W8A8"])
def test_a_type_of_another_form_is_refused(name):
    with pytest.raises(UsageError):
        parse_type(name)
