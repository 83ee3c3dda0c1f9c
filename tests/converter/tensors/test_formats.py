"""Conversions of number formats against torch, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rkconvert.tensors.formats import all_finite, from_float32, to_float32

FLOAT32 = npst.arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1))


def _torch(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def test_every_bfloat16_is_read_as_torch_reads_it():
    every = np.arange(1 << 16, dtype=np.uint16)
    mine, theirs = to_float32(every, "BF16"), _torch(every).float().numpy()
    np.testing.assert_array_equal(mine.view(np.uint32), theirs.view(np.uint32))


@given(FLOAT32)
def test_rounding_to_bfloat16_is_torchs(words):
    values = words.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(from_float32(values.copy(), "BF16"), expected)


@given(FLOAT32)
def test_rounding_to_float16_is_torchs(words):
    values = words.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values.copy()).half().numpy()
    np.testing.assert_array_equal(from_float32(values.copy(), "F16"), expected)


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (7,)])
def test_shapes_stay(shape):
    values = np.ones(shape, np.float32)
    there = from_float32(values.copy(), "BF16")
    assert there.shape == shape
    np.testing.assert_array_equal(to_float32(there, "BF16"), values)


def test_finite_is_told_from_nan_and_infinity_for_every_bfloat16():
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.isfinite(_torch(every)).numpy()
    assert [all_finite(every[at : at + 1], "BF16") for at in range(0, 1 << 16, 17)] == list(expected[::17])
    assert not all_finite(np.array([1, np.nan], np.float32), "F32")


@given(npst.arrays(np.float64, 4, elements=st.sampled_from([0.0, 1e-300, 3.4e38, -3.5e38, 1e300, -np.inf, np.nan])))
def test_what_float32_cannot_hold_is_not_finite(values):
    assert all_finite(values, "F64") == bool(torch.from_numpy(values).float().isfinite().all())
