"""A GGUF file's tokenizer: settings that would change its tokens, and the work that it asks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rkconvert.sources.gguf_tokenizer import merges, tokenizer_json
from rkruntime.errors import CheckpointError


def made(**changed: Any) -> Any:
    tokens = ["<unk>", "<s>", "<bos>", "a", "b", "ab"]
    settings = {"model": "llama", "tokens": tokens, "scores": [0.0] * 6, "token_type": [2, 3, 3, 1, 1, 1]}
    settings |= {"unknown_token_id": 0, "add_space_prefix": False} | changed
    metadata = {f"tokenizer.ggml.{key}": value for key, value in settings.items() if value is not None}
    return tokenizer_json(SimpleNamespace(path=Path("x.gguf"), metadata=metadata))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["add_space_prefix", "add_eos_token", "remove_extra_whitespaces"])
def test_settings_that_change_tokens_are_refused(key: str) -> None:
    assert made()["model"]["merges"] == [("a", "b")]
    with pytest.raises(CheckpointError, match=key):
        made(**{key: True})


def test_without_a_word_llama_cpp_puts_a_space_in_front() -> None:
    with pytest.raises(CheckpointError, match="add_space_prefix True"):
        made(add_space_prefix=None)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_have_no_order(score: float) -> None:
    with pytest.raises(CheckpointError, match="whose score is not a number"):
        made(scores=[0.0] * 5 + [score])


def test_no_tokens() -> None:
    with pytest.raises(CheckpointError):
        made(tokens=[], scores=[], token_type=[])


def test_tokens_with_far_too_many_merges_are_refused() -> None:
    tokens = [letter * length for letter in "abcd" for length in range(1, 1025)]
    vocab = {token: at for at, token in enumerate(tokens)}
    with pytest.raises(CheckpointError, match="far more ways"):
        merges(tokens, [0.0] * len(tokens), [1] * len(tokens), vocab)
