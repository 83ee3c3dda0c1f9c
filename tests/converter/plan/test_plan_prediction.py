"""The prediction against the vendor's figures, each of a model that it was not fitted on."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from rkconvert.model.shapes import parse_shape
from rkconvert.model.sizes import cache_bytes_per_token, file_bytes, npu_bytes
from rkconvert.plan.prediction import accuracy, costs_for, costs_of, fit, nearest, vendor_rows
from rkconvert.rules.type_names import parse_type
from rkruntime.errors import UsageError

# 2112 MHz, twice a cycle, 64 bits: the memory clock that the vendor's figures were taken with.
DDR_GB_PER_S = 2112e6 * 2 * 8 / 1e9


# docs/plan.md: each model predicted from all others, mean error (largest in brackets).
_CELL = r"([\d.]+) % \(([\d.]+)\)"
_LINE = re.compile(rf"\| (RK35\d\d) (w\w+), ([\d.]+), (\d+) models \| {_CELL} \| {_CELL} \| {_CELL} \|")
FIGURES = ("decode_tokens_per_s", "memory_mb", "ttft_ms")


def errors_of(platform: str, kind: str, release: str, figure: str) -> list[float]:
    """Relative errors, each model left out with all of its rows; by hand, as a check of `accuracy`."""
    found = []
    rows = [row for row in vendor_rows() if row.platform == platform]
    for row in rows:
        if (row.kind.name, row.release) != (kind, release):
            continue
        costs = fit([other for other in rows if other.model != row.model], release)
        tokens = row.prompt_tokens + row.new_tokens
        predicted = {
            "decode_tokens_per_s": 1000 / costs.token_ms(row.shape, row.kind, row.prompt_tokens + row.new_tokens / 2),
            "memory_mb": costs.memory_bytes(row.shape, row.kind, tokens, release < "1.2.0") / 2**20,
            "ttft_ms": costs.prompt_ms(row.shape, row.kind) * row.prompt_tokens / 128,
        }
        found.append(abs(predicted[figure] / getattr(row, figure) - 1))
    return found


def test_the_page_says_how_far_off_predictions_are():
    lines = _LINE.findall((Path(__file__).parents[3] / "docs" / "plan.md").read_text())
    stated = {tuple(line[:3]) for line in lines}
    plain = {(row.platform.upper(), row.kind.name, row.release) for row in vendor_rows()}
    assert stated == plain
    for platform, kind, release, models, *cells in lines:
        for figure, mean, largest in zip(FIGURES, cells[::2], cells[1::2], strict=True):
            errors = errors_of(platform.lower(), kind, release, figure)
            assert len(errors) == int(models)
            assert f"{100 * sum(errors) / len(errors):.1f}" == mean, (platform, kind, release, figure)
            assert f"{100 * max(errors):.1f}" == largest, (platform, kind, release, figure)
            said = accuracy(platform.lower(), parse_type(kind), release)[figure]
            assert (said.rows, f"{100 * said.mean:.1f}", f"{100 * said.largest:.1f}") == (len(errors), mean, largest)


def test_memory_is_never_far_too_low():
    """A model that does not fit must not be told to fit: this bounds what the verdicts' margin must cover."""
    for platform, kind, release in {(row.platform, row.kind.name, row.release) for row in vendor_rows()}:
        assert max(errors_of(platform, kind, release, "memory_mb")) <= 0.09


def test_a_table_in_ram_takes_four_bytes_a_weight():
    """Before 1.2.0 it is in RAM. With 4 bytes the peaks of 1.1.0 are those of 1.2.1 and the table."""
    rows = {
        (row.model, row.release): row for row in vendor_rows() if (row.platform, row.kind.name) == ("rk3588", "w8a8")
    }
    both = [model for model, release in rows if release == "1.1.0" and (model, "1.2.1") in rows]
    assert len(both) == 5
    off = {}
    for size in (2, 4):
        off[size] = [
            rows[model, "1.2.1"].memory_mb + rows[model, "1.1.0"].shape.head.weights * size / 2**20
            - rows[model, "1.1.0"].memory_mb
            for model in both
        ]  # fmt: skip
    assert all(abs(difference) < 155 for difference in off[4])
    assert max(abs(difference) for difference in off[2]) > 1000


def test_the_constants_are_physical():
    for platform, kind, release in {(row.platform, row.kind, row.release) for row in vendor_rows()}:
        costs = costs_of(platform, kind, release)
        assert costs.release == release
        assert costs.bandwidth_gb_per_s < DDR_GB_PER_S
        assert costs.layer_ms > 0
        assert costs.prefill_layer_ms >= 0
        assert costs.fixed_bytes >= 0
        assert costs.vocabulary_bytes > 0
        assert costs.group_ms > 0
        # At least the scale; the memory of 1.1.0 is published in hundredths of a GiB.
        assert costs.group_bytes > (4 if release != "1.1.0" else 2)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("1.1.4", "1.1.0"), ("1.2.0", "1.1.0"), ("1.2.1b1", "1.1.0"), ("1.3.1", "1.3.0"), ("1.0", "1.1.0")],
)
def test_the_nearest_release_is_not_a_newer_one(wanted, found):
    assert nearest({"1.3.0", "1.1.0", "1.2.1"}, wanted) == found


def test_the_vendors_own_row_is_met():
    for row in vendor_rows():
        costs = costs_for(row.platform, row.kind, row.release, row.shape)
        tokens = row.prompt_tokens + row.new_tokens
        assert costs.token_ms(row.shape, row.kind, tokens - row.new_tokens / 2) == pytest.approx(row.token_ms)
        assert costs.prompt_ms(row.shape, row.kind) == pytest.approx(row.prompt_ms)
        memory = costs.memory_bytes(row.shape, row.kind, tokens, row.release < "1.2.0")
        # Or the weights and the cache alone, which some of the vendor's figures do not reach.
        assert memory == pytest.approx(max(row.memory_mb * 2**20, row.held_bytes))
        assert row.held_bytes < 1.05 * row.memory_mb * 2**20


def test_more_of_anything_is_slower_and_larger():
    config = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 23, "num_attention_heads": 32, "num_key_value_heads": 4,
    }  # fmt: skip
    kind = parse_type("w8a8")
    for release in ("1.1.0", "1.2.1", "1.3.0"):
        costs = costs_of("rk3588", kind, release)
        base = costs.predict(parse_shape(config), kind, False)
        for change in ({"num_hidden_layers": 24}, {"vocab_size": 64000}, {"intermediate_size": 6000}):
            larger = costs.predict(parse_shape(config | change), kind, False)
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


@pytest.mark.parametrize("context", [32, 192, 4096])
def test_memory_is_never_less_than_its_parts(context):
    """Also where a fitted cost, or the vendor's own figure for a model, is smaller."""
    shapes = {row.model: row.shape for row in vendor_rows()}
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 46}
    sizes = {"hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32, "num_key_value_heads": 16}
    shapes["gemma-2-27b"] = parse_shape({**gemma, **sizes, "head_dim": 128})
    kinds = ["w8a8", "w8a8_g128", "w8a8_g512", "w4a16", "w4a16_g32", "w4a16_g128", "fp16"]
    for platform, name, release in product(("rk3588", "rk3576"), kinds, ("1.1.0", "1.2.0", "1.2.1", "1.3.0")):
        kind = parse_type(name)
        for shape in shapes.values():
            try:
                costs = costs_for(platform, kind, release, shape)
            except KeyError:
                continue
            least = npu_bytes(shape, kind) + context * cache_bytes_per_token(shape)
            assert costs.memory_bytes(shape, kind, context, False) >= least
            table = costs.memory_bytes(shape, kind, context, True)
            assert table >= least + 4 * shape.vocab_size * shape.hidden_size
