"""Int8 rows: every value within half a step, the largest exact, groups independent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rkconvert.demo.w8a8 import round_int8
from rkconvert.emulated.quantize import group_size, quantize_rows
from rkruntime.errors import RefusedError

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 64])),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


@given(ROWS)
def test_each_value_is_within_half_a_step_and_the_peak_is_exact(rows):
    values, scale = quantize_rows(rows, rows.shape[1])
    assert values.dtype == np.int8
    assert scale.shape == (len(rows), 1)
    error = np.abs(values.astype(np.float64) * scale - rows)
    assert (error <= scale.astype(np.float64) * 0.5000001 + np.finfo(np.float32).tiny * 128).all()
    peaks = np.abs(rows).max(axis=1) > np.finfo(np.float32).tiny * 127
    assert (np.abs(values).max(axis=1)[peaks] == 127).all()


@given(ROWS)
def test_a_group_is_quantized_as_if_it_stood_alone(rows):
    values, scale = quantize_rows(rows, 4)
    for at in range(rows.shape[1] // 4):
        alone, alone_scale = quantize_rows(np.ascontiguousarray(rows[:, at * 4 : at * 4 + 4]), 4)
        np.testing.assert_array_equal(values[:, at * 4 : at * 4 + 4], alone)
        np.testing.assert_array_equal(scale[:, at : at + 1], alone_scale)


def test_it_is_the_arithmetic_that_the_demo_was_trained_against():
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    values, scale = quantize_rows(rows.numpy(), 64)
    np.testing.assert_allclose(values * scale, round_int8(rows).numpy(), rtol=0, atol=1e-6)


def test_group_sizes():
    assert group_size("w8a8", 96) == 96
    assert group_size("w8a8_g32", 96) == 32
    with pytest.raises(RefusedError, match="multiple of 128"):
        group_size("w8a8_g128", 96)
