"""config.json values that mean something else, or nothing, to transformers."""

from __future__ import annotations

import json

import pytest

from rkconvert import demo
from rkconvert.model.gemma import parse_config
from rkruntime.errors import CheckpointError

CONFIG = json.loads((demo.checkpoint() / "config.json").read_text())


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_cap_of_zero_is_not_no_cap(key):
    for zero in (0, 0.0, -0.0):
        with pytest.raises(CheckpointError, match="divides"):
            parse_config({**CONFIG, key: zero})
    assert getattr(parse_config({**CONFIG, key: None}), key) == 0


def test_some_token_ends_an_answer():
    with pytest.raises(CheckpointError, match="empty list"):
        parse_config({**CONFIG, "eos_token_id": []})


def test_a_window_of_zero_is_not_no_window():
    """transformers cannot build its mask."""
    with pytest.raises(CheckpointError, match="sliding_window is 0"):
        parse_config({**CONFIG, "sliding_window": 0})
    assert not any(parse_config({**CONFIG, "sliding_window": None}).sliding_layers)
