"""The engine over an emulator that does what boards may do instead: every answer is right, every failure an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rkboard.emulator.faults import guesses
from rkruntime.engine.generation import FinishReason, Request
from rkruntime.errors import RunError
from rkruntime.text.template import GemmaTemplate, Message
from rkruntime.text.tokenizer import Tokenizer

GUESSES = [guess.name for guess in guesses()]


def newer(release: str, than: str) -> bool:
    return tuple(map(int, release.split("b")[0].split("."))) >= tuple(map(int, than.split(".")))


@pytest.fixture(scope="module")
def prompt(demo_tokenizer: Tokenizer) -> list[int]:
    return demo_tokenizer.assemble(GemmaTemplate(demo_tokenizer).parts([Message("user", "What is the RK3588?")]))


@pytest.mark.parametrize("release", ["1.1.4", "1.2.3", "1.3.0"])
@pytest.mark.parametrize(
    ("guess", "asynchronous"), [*((guess, False) for guess in GUESSES), *((",".join(GUESSES), on) for on in (0, 1))]
)
def test_runs_are_right_either_way(
    guess: str,
    asynchronous: bool,
    release: str,
    load: Any,
    prompt: list[int],
    ids_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = load(release)
    expected = ids_of(usual.generate(Request(prompt, max_new_tokens=8)))
    hidden = usual.hidden_states(Request(prompt))
    monkeypatch.setenv("RKEMU_GUESS", guess)
    engine = load(release, asynchronous=bool(asynchronous))

    def answers() -> None:
        *tokens, finished = engine.generate(Request(prompt, max_new_tokens=8))
        assert (ids_of(tokens), finished.reason) == (expected, FinishReason.LENGTH)

    answers()
    *tokens, finished = engine.generate(Request(prompt, stop_tokens=frozenset({expected[4]})))
    assert (ids_of(tokens), finished.reason) == (expected[: expected.index(expected[4])], FinishReason.STOP)
    answers()
    with pytest.raises(RunError):
        list(engine.generate(Request(prompt, lora="unknown")))
    answers()
    np.testing.assert_array_equal(engine.hidden_states(Request(prompt)), hidden)
    if newer(release, "1.2.0"):
        np.testing.assert_array_equal(engine.logits(Request(prompt)), usual.logits(Request(prompt)))
    for count in (1, 3):  # abandoned in the middle
        events = engine.generate(Request(prompt, max_new_tokens=100))
        assert [next(events).token_id for _ in range(count)] == expected[:count]
        events.close()
    answers()


@pytest.mark.parametrize("release", ["1.2.3", "1.3.0"])
def test_a_prompt_that_is_not_read_is_an_error(
    release: str, load: Any, prompt: list[int], ids_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_GUESS", "pause-resumes")
    engine = load(release)
    expected = ids_of(engine.generate(Request(prompt, max_new_tokens=8)))
    pausing = Request(prompt, max_new_tokens=8, pause_tokens=frozenset({expected[2]}))
    assert list(engine.generate(pausing))[-1].reason is FinishReason.PAUSE
    with pytest.raises(RunError, match="did not read this prompt"):
        list(engine.generate(Request(prompt, max_new_tokens=4)))
    assert ids_of(engine.generate(Request(prompt, max_new_tokens=8))) == expected
    assert list(engine.generate(pausing))[-1].reason is FinishReason.PAUSE
    engine.clear_cache()
    assert ids_of(engine.generate(Request(prompt, max_new_tokens=8))) == expected
