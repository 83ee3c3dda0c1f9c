"""Patterns of a stranger's adapter: peft's result, or a refusal; never a match that takes for ever."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from rkconvert.adapters.config import AdapterConfig
from rkconvert.adapters.patterns import are_safe
from rkruntime.errors import AdapterError

NAMES = [
    "model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj",
    "model.layers.45.mlp.gate_proj", "lm_head",
]  # fmt: skip
EXPONENTIAL = [
    ".?" * 40 + "Z", ".??" * 40 + "Z", "(?:.|.)" * 40 + "Z", "(?:.?|a)" * 40 + "Z", "(a+)+Z", "(?:.*.*)*Z",
    ".{0,1}" * 40 + "Z", "(?:.?){40}Z", "(?=" + ".?" * 40 + ")Z", ".*" * 30 + "Z", "(?:(?:){9999}){9999}",
    "(?:){4294967294}", "(?:(?:.|.){2}){20}Z", "(((.?.?)?.?)?.?)?" * 9 + "Z", "a{99999999999999}",
    "(.)?" * 40 + r"\\1Z", "(?>.?)" * 40 + "Z",
]  # fmt: skip
# Those of peft's documentation and of adapters on the hub.
USUAL = [
    "q_proj", "model.layers.0.self_attn.q_proj", ".*q_proj", r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
    r".*\.(0|1|2|3|4|5|6|7|8|9|10|11)\..*_proj", "^model.*layers.*proj", "[qkv]_proj", "(self_attn|mlp).*proj",
    "(?!lm_head).*", "layers.[0-9]{1,2}.mlp",
]  # fmt: skip


def rank(patterns: list[str], name: str) -> int:
    table = {pattern: at for at, pattern in enumerate(patterns, 2)}
    return AdapterConfig(Path("adapter_config.json"), {"r": 1, "rank_pattern": table}).rank(name)


def test_usual_patterns_are_taken_as_peft_takes_them() -> None:
    for name in NAMES:
        for patterns in (*([pattern] for pattern in USUAL), USUAL):
            own = get_pattern_key(patterns, name)
            assert rank(patterns, name) == (patterns.index(own) + 2 if own in patterns else 1)


@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"]
)
def test_no_pattern_takes_for_ever(key: str) -> None:
    """In a process of its own: a match cannot be interrupted."""
    code = f"""
from pathlib import Path
from rkconvert.adapters.config import AdapterConfig
from rkconvert.adapters.contents import check_contents
from rkconvert.adapters.targets import Targets
from rkruntime.errors import AdapterError
for pattern in {EXPONENTIAL!r}:
    forms = {{"rank_pattern": {{pattern: 4}}, "alpha_pattern": {{pattern: 4}}, "modules_to_save": [pattern]}}
    value = forms.get({key!r}, pattern)
    config = AdapterConfig(Path("x"), {{"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], {key!r}: value}})
    for name in {NAMES!r}:
        try:
            config.scaling(name)
            targets = Targets.of(config, {{f"{{name}}.weight": (4, 4)}})
            check_contents(targets, {{name: ("lora_A", "lora_B")}})
        except AdapterError:
            pass
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


ATOMS = st.sampled_from(["a", ".", "[a-z.]", r"\\d", "q_proj", "^", "$", "(?:)"])
REPEATS = st.sampled_from(["?", "*", "+", "{2}", "{0,3}", "*?", "??"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("(?:{})".format),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{0,3}", "*?", "??"])).map(
            lambda it: f"(?:{it[0]}){it[1]}"
        ),
    ),
    max_leaves=25,
)


@given(PATTERNS)
def test_random_patterns_are_matched_or_refused(pattern: str) -> None:
    try:
        found = [rank([pattern], name) for name in NAMES]
    except AdapterError:
        assert not are_safe([rf"(.*\.)?({pattern})$"])
    else:
        assert found == [2 if re.match(rf"(.*\.)?({pattern})$", name) else 1 for name in NAMES]
