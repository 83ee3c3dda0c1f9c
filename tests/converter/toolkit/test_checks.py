"""The rules before a conversion with the toolkit, each with models that break it and models that do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rkconvert.model.shapes import parse_shape
from rkconvert.output.host_memory import HostMemory, read_memory
from rkconvert.toolkit import checks
from rkconvert.toolkit.checks import Conversion
from rkruntime.errors import CheckpointError, HostError, RefusedError

# Settings of Google's own config.json files.
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
GEMMA2 = {
    "2B": dict(zip(NAMES, (2304, 9216, 26, 8, 4, 256), strict=True)),
    "9B": dict(zip(NAMES, (3584, 14336, 42, 16, 8, 256), strict=True)),
    "27B": dict(zip(NAMES, (4608, 36864, 46, 32, 16, 128), strict=True)),
}
PLENTY = HostMemory(1 << 40, 0, 1 << 40)
TOKENS = {"<bos>": 2, "<eos>": 1, "<start_of_turn>": 106, "<end_of_turn>": 107}


@pytest.fixture
def case(tmp_path: Path) -> Any:
    """`case(size, field=value)`: a conversion that breaks no rule but those that the fields ask for."""
    (tmp_path / "config.json").write_text("{}")

    def make(size: str = "2B", settings: dict[str, int] | None = None, **fields: Any) -> Conversion:
        shape = parse_shape({"architectures": ["Gemma2ForCausalLM"], **GEMMA2[size], **(settings or {})})
        good = Conversion(tmp_path, shape, "w8a8", "float32", "", PLENTY, TOKENS, "", 2, "<bos>", True)
        return replace(good, **fields)

    return make


def broken(case: Conversion) -> list[str]:
    return [finding.rule.name for finding in checks.run(case)]


def test_every_rule_has_a_sentence_a_hint_and_a_source() -> None:
    names = [rule.name for rule in checks.RULES]
    assert len(set(names)) == len(names)
    for rule in checks.RULES:
        assert rule.source
        assert rule.hint.endswith(".")
        assert not rule.sentence.endswith(".")


@pytest.mark.parametrize("size", GEMMA2)
def test_google_s_models_break_none(case: Any, size: str) -> None:
    assert broken(case(size)) == []


# 2304 is 9 x 256; every width of 9B and 27B is a multiple of 512.
@pytest.mark.parametrize("size", GEMMA2)
@pytest.mark.parametrize("dtype", ["w8a8_g128", "w8a8_g256", "w8a8_g512", "w4a16_g32", "w4a16_g64", "w4a16_g128"])
def test_groups(case: Any, size: str, dtype: str) -> None:
    assert broken(case(size, dtype=dtype)) == (["group"] if (size, dtype) == ("2B", "w8a8_g512") else [])


def test_a_group_that_does_not_divide_names_one_that_does(case: Any) -> None:
    with pytest.raises(RefusedError, match="multiples of 512, but o_proj has 2304 outputs and q_proj 2304") as caught:
        checks.require(case(dtype="w8a8_g512"))
    assert "w8a8_g256" in caught.value.hint
    assert caught.value.details["rule"] == "group"
    assert "manuals 1.1.4" in str(caught.value.details["source"])


@pytest.mark.parametrize(("heads", "size", "narrow"), [(1, 64, True), (1, 94, True), (1, 96, False), (2, 48, False)])
def test_width(case: Any, heads: int, size: int, narrow: bool) -> None:
    settings = {"num_key_value_heads": heads, "head_dim": size}
    assert ("narrow" in broken(case(settings=settings))) is narrow
    assert "narrow" not in broken(case(settings=settings, dtype="fp16"))


GB = 10**9
# 2.614 billion weights: 10.46 GB as float32, 5.23 GB as bfloat16; the w8a8 file is some 3.8 GB.
MEMORY = [
    (10 * GB, 0, "float32", ["memory"]),
    (10 * GB, 1 * GB, "float32", ["memory-tight"]),
    (13 * GB, 0, "float32", ["memory-tight"]),
    (16 * GB, 0, "float32", []),
    (5 * GB, 0, "bfloat16", ["memory"]),
    (7 * GB, 0, "bfloat16", ["memory-tight"]),
    (10 * GB, 0, "bfloat16", []),
]


@pytest.mark.parametrize(("ram", "swap", "load_dtype", "expected"), MEMORY)
def test_memory(case: Any, ram: int, swap: int, load_dtype: str, expected: list[str]) -> None:
    assert broken(case(memory=HostMemory(ram, swap, ram), load_dtype=load_dtype)) == expected


def test_a_27b_on_a_laptop_is_told_its_numbers(case: Any) -> None:
    with pytest.raises(HostError, match=r"108\.9 GB as float32 alone.*32\.0 GB of RAM and 8\.0 GB of swap") as caught:
        checks.require(case("27B", memory=HostMemory(32 * GB, 8 * GB, GB)))
    assert "Add more than 69 GB of swap" in caught.value.hint


def test_calibration(case: Any) -> None:
    assert broken(case(calibrated=False)) == broken(case(calibrated=False, dtype="w8a8_g128")) == ["uncalibrated"]
    assert broken(case(calibrated=False, dtype="fp16")) == []
    notes = checks.require(case(calibrated=False))
    assert "rkedge calibrate" in notes[0]


@pytest.mark.parametrize("token", ["<bos>", "<start_of_turn>", "<end_of_turn>"])
def test_a_tokenizer_without_turns(case: Any, token: str) -> None:
    tokens = {text: index for text, index in TOKENS.items() if text != token}
    with pytest.raises(CheckpointError, match=f"no token {token}"):
        checks.require(case(tokens=tokens))


@pytest.mark.parametrize(("token", "broken_"), [("<bos>", False), ("<eos>", True), ("<s>", True)])
def test_two_first_tokens(case: Any, token: str, broken_: bool) -> None:
    assert ("two-bos" in broken(case(bos_token=token))) is broken_


def test_an_own_head(case: Any) -> None:
    tied = case()
    assert broken(tied) == []
    assert broken(replace(tied, shape=replace(tied.shape, tied=False))) == ["own-head"]
    assert "without a word" in checks.require(replace(tied, shape=replace(tied.shape, tied=False)))[0]


def test_pointers(case: Any, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, tokenizer\.model are Git LFS pointers"):
        checks.require(case())
    (tmp_path / "tokenizer.model").write_text(json.dumps("version https://git-lfs"))
    (tmp_path / "tokenizer.json").unlink()
    assert broken(case()) == []


def test_memory_is_the_container_s_and_has_swap(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    text = "MemTotal: 1000 kB\nMemAvailable:    900 kB\nSwapTotal: 50 kB\nHugePages_Total: 0\n"
    (tmp_path / "proc" / "meminfo").write_text(text)
    assert read_memory(tmp_path) == HostMemory(1_024_000, 51_200, 921_600)
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("512000\n")
    (group / "memory.current").write_text("12000\n")
    assert read_memory(tmp_path) == HostMemory(512_000, 51_200, 500_000)
    (tmp_path / "proc" / "meminfo").unlink()
    with pytest.raises(HostError, match="memory cannot be read"):
        read_memory(tmp_path)


def test_memory_of_this_machine() -> None:
    memory = read_memory()
    assert 0 < memory.available <= memory.ram
    assert memory.total == memory.ram + memory.swap
