"""Prompts of other kinds, arrays, and what the KV cache keeps, over every layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtime.engine.one_question import ANSWER, QUESTION, Load, newer, text_of

from rkruntime.bundle.rkemu import read_container
from rkruntime.engine.generation import (
    EmbeddingPrompt,
    Finished,
    FinishReason,
    HiddenStates,
    Logits,
    Request,
    TextPrompt,
)
from rkruntime.errors import (
    RunError,
    UnsupportedCallError,
    UsageError,
)


def test_text_prompts(load: Load, release: str, stops: frozenset[int]) -> None:
    """From 1.2.0 on the runtime wraps a text in the model's template; before, the caller does."""
    engine = load(release)
    text = "What is the RK3588?"
    if not newer(release, "1.2.0"):
        text = QUESTION.removeprefix("<bos>")
    *tokens, finished = engine.generate(Request(prompt=TextPrompt(text), stop_tokens=stops))
    assert text_of(tokens) == ANSWER
    assert (finished.prompt_tokens > 0) == newer(release, "1.2.1")


def test_roles(load: Load, release: str) -> None:
    request = Request(prompt=TextPrompt("{}", role="tool"), max_new_tokens=2)
    if newer(release, "1.2.1"):
        assert len(list(load(release).generate(request))) == 3
    else:
        with pytest.raises(UnsupportedCallError, match=r"RKLLMInput\.role requires release 1\.2\.1"):
            list(load(release).generate(request))


def test_embedding_prompts(load: Load, release: str, bundle: Any, question: list[int], ids_of: Any) -> None:
    container = read_container(bundle.model)
    table = container.read("token_embd").astype(np.float32) * container.read("token_embd.scale")
    engine = load(release)
    expected = ids_of(engine.generate(Request(question, max_new_tokens=10)))
    *tokens, finished = engine.generate(Request(prompt=EmbeddingPrompt(table[question]), max_new_tokens=10))
    assert ids_of(tokens) == expected
    assert finished.prompt_tokens == len(question)
    for shape in ((3,), (0, 128), (2, 2, 128)):
        with pytest.raises(UsageError, match="2 dimensions"):
            list(engine.generate(Request(prompt=EmbeddingPrompt(np.zeros(shape, np.float32)))))


@pytest.mark.parametrize("tokens", [[], [2**31], [-1], ["a"], [1.5]])
def test_prompts_that_are_none(load: Load, tokens: list[Any]) -> None:
    engine = load()
    with pytest.raises(UsageError):
        list(engine.generate(Request(tokens)))
    with pytest.raises(UsageError, match="NUL"):
        list(engine.generate(Request(prompt=TextPrompt("a\0b"))))
    with pytest.raises(RunError) as caught:
        list(engine.generate(Request([1023, 1024])))
    assert any("not in the vocabulary" in line for line in caught.value.details["log"])
    assert len(list(engine.generate(Request([2, 3], max_new_tokens=1)))) == 2


@pytest.mark.usual("logits-once")
def test_hidden_states_and_logits(load: Load, release: str, bundle: Any, question: list[int], ids_of: Any) -> None:
    engine = load(release)
    hidden = engine.hidden_states(Request(question))
    assert (hidden.shape, hidden.dtype) == ((len(question), 128), np.float32)
    assert np.isfinite(hidden).all()
    expected = ids_of(engine.generate(Request(question, max_new_tokens=6)))
    if not newer(release, "1.2.0"):
        with pytest.raises(UnsupportedCallError, match="RKLLM_INFER_GET_LOGITS"):
            engine.logits(Request(question))
        return
    logits = engine.logits(Request(question))
    assert logits.shape == (len(question), 1024)
    assert int(logits[-1].argmax()) == expected[0]
    events = list(engine.generate_arrays(Request(question, max_new_tokens=6), "logits"))
    assert ids_of(events) == expected
    arrays = [event.values for event in events if isinstance(event, Logits)]
    assert [array.shape[0] for array in arrays] == [len(question), 1, 1, 1, 1, 1]
    assert [int(array[-1].argmax()) for array in arrays][:1] == expected[:1]
    only = list(engine.generate_arrays(Request(question), "hidden"))
    assert [type(event) for event in only] == [HiddenStates, Finished]
    with pytest.raises(UsageError, match="no mode"):
        list(engine.generate_arrays(Request(question), "embeddings"))


def test_cache_calls(load: Load, release: str, question: list[int]) -> None:
    engine = load(release)
    list(engine.generate(Request(question, max_new_tokens=5)))
    if not newer(release, "1.2.0"):
        with pytest.raises(UnsupportedCallError, match=r"rkllm_clear_kv_cache requires release 1\.2\.0 or later"):
            engine.clear_cache()
        return
    if newer(release, "1.2.1"):
        assert engine.cache_sizes()[0] >= len(question)
        engine.clear_cache()
        assert engine.cache_sizes() == [0]
    else:
        with pytest.raises(UnsupportedCallError, match=r"rkllm_get_kv_cache_size requires release 1\.2\.1 or later"):
            engine.cache_sizes()
        engine.clear_cache(keep_system_prompt=True)
        with pytest.raises(UnsupportedCallError, match="ranges"):
            engine.clear_cache(ranges=[(0, 1)])


def test_keep_history(load: Load, release: str, question: list[int]) -> None:
    engine = load(release)
    request = Request(question, max_new_tokens=4, keep_history=True)
    if not newer(release, "1.2.0"):
        with pytest.raises(UnsupportedCallError, match=r"keep_history requires release 1\.2\.0"):
            list(engine.generate(request))
        return
    list(engine.generate(request))
    if newer(release, "1.2.1"):
        first = engine.cache_sizes()[0]
        list(engine.generate(request))
        assert engine.cache_sizes()[0] >= first + len(question)


@pytest.mark.usual("pause-resumes")
def test_pause_and_ranges(load: Load, release: str, question: list[int], ids_of: Any) -> None:
    """A run pauses at a token; a range of its cache is taken out, and it goes on from there."""
    engine = load(release)
    whole = ids_of(engine.generate(Request(question, max_new_tokens=8)))
    request = Request(question, pause_tokens=frozenset({whole[3]}))
    if not newer(release, "1.2.1"):
        with pytest.raises(UnsupportedCallError, match=r"Pausing a run requires release 1\.2\.1"):
            list(engine.generate(request))
        return
    *tokens, finished = engine.generate(request)
    assert (ids_of(tokens), finished.reason) == (whole[:4], FinishReason.PAUSE)
    size = engine.cache_sizes()[0]
    engine.clear_cache(ranges=[(size - 2, size)])
    assert engine.cache_sizes() == [size - 2]
    # What was taken out is said again as the next prompt, and the answer goes on as if nothing had been.
    *tokens, _ = engine.generate(Request(whole[1:4], max_new_tokens=4))
    assert ids_of(tokens) == whole[4:8]


def test_prompt_cache_files(load: Load, release: str, question: list[int], tmp_path: Path, ids_of: Any) -> None:
    path = tmp_path / "prompt.cache"
    engine = load(release)
    expected = ids_of(engine.generate(Request(question, max_new_tokens=6, save_prompt_cache=path)))
    assert path.stat().st_size > 0
    engine.close()
    engine = load(release)
    engine.load_prompt_cache(path)
    *tokens, finished = engine.generate(Request(question, max_new_tokens=6))
    assert ids_of(tokens) == expected
    if finished.perf:
        assert finished.perf.prefill_tokens == 1
    engine.load_prompt_cache(path)
    for _ in range(2):  # a row for each token, and not only for those that the file does not have
        assert len(engine.hidden_states(Request(question))) == len(question)
    engine.release_prompt_cache()
    path.write_bytes(b"damaged")
    with pytest.raises(RunError, match="rkllm_load_prompt_cache returned -1") as caught:
        engine.load_prompt_cache(path)
    assert caught.value.details["log"]
    assert ids_of(engine.generate(Request(question, max_new_tokens=6))) == expected


@pytest.mark.parametrize("late", [False, True])
def test_an_abort_while_a_callback_is_asked(load: Load, model_without: Any, question: list[int], late: bool) -> None:
    """The run ends as aborted, whether the program answers or fails afterwards; the next one is right."""
    held: list[Any] = []

    def tokenize(text: str) -> list[int]:
        if held:
            held.pop().abort()
            if late:
                raise ValueError("no longer wanted")
        return question

    engine = load("1.3.0", model=model_without("tokenizer"), tokenizer=tokenize, token_timeout=20.0)
    request = Request(prompt=TextPrompt("What is the RK3588?"), max_new_tokens=3)
    expected = list(engine.generate(request))[:-1]
    held.append(engine)
    events = list(engine.generate(request))
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.ABORT
    assert list(engine.generate(request))[:-1] == expected


@pytest.mark.parametrize("kind", ["nothing", "no folder", "fifo", "folder"])
def test_a_prompt_cache_is_a_file(kind: str, load: Load, tmp_path: Path) -> None:
    """The library would say that the model cannot be opened, or wait for whoever writes to a FIFO."""
    engine = load(token_timeout=4.0)
    path = tmp_path / ("no" if kind == "no folder" else ".") / "cache"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(RunError, match="prompt cache"):
        engine.load_prompt_cache(path)
    if kind != "nothing":
        with pytest.raises(RunError, match="prompt cache"):
            list(engine.generate(Request([2, 106], max_new_tokens=1, save_prompt_cache=path)))
    assert list(engine.generate(Request([2, 106], max_new_tokens=1)))
