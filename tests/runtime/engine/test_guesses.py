"""The engine over an emulator that does what boards may do instead: every answer is right, every failure an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rkboard.emulator.faults import guesses
from rkruntime.engine.generation import Finished, FinishReason, Request, TextPrompt
from rkruntime.errors import RunError
from rkruntime.text.template import GemmaTemplate, Message
from rkruntime.text.tokenizer import Tokenizer

GUESSES = [guess.name for guess in guesses() if not guess.only_told]


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test says itself what is guessed."""
    monkeypatch.delenv("RKEMU_GUESS", raising=False)


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
    wraps = "tokens-wrapped" in guess and newer(release, "1.2.0")
    if wraps:  # which shows in the first run only
        list(engine.generate(Request(prompt, max_new_tokens=1)))
    assert [finding.code for finding in engine.findings] == ["token-input-wrapped"] * wraps

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


def arrays(engine: Any, prompt: list[int], release: str) -> list[Any]:
    found = [engine.hidden_states(Request(prompt))]
    return found + ([engine.logits(Request(prompt))] if newer(release, "1.2.0") else [])


@pytest.mark.parametrize("guess", ["", "arrays-whole", "tokens-wrapped", "tokens-wrapped,arrays-whole"])
@pytest.mark.parametrize("release", ["1.1.4", "1.2.0", "1.2.3"])
def test_arrays_do_not_depend_on_the_runs_before(
    release: str, guess: str, load: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = arrays(load(release), prompt, release)
    monkeypatch.setenv("RKEMU_GUESS", guess)
    engine = load(release)
    for before in (prompt, prompt[:-3], [*prompt[:5], *prompt]):
        list(engine.generate(Request(before, max_new_tokens=3)))
        for _ in range(2):
            for found, right in zip(arrays(engine, prompt, release), expected, strict=True):
                np.testing.assert_array_equal(found, right)
    fresh = load(release)  # nothing has shown yet what the library does
    np.testing.assert_array_equal(fresh.hidden_states(Request(prompt)), expected[0])


@pytest.mark.parametrize("release", ["1.2.0", "1.2.3", "1.3.0"])
def test_a_template_around_token_ids_is_noticed_and_emptied(
    release: str,
    load: Any,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    usual = load(release)
    list(usual.generate(Request(prompt, max_new_tokens=2)))
    assert not usual.findings
    monkeypatch.setenv("RKEMU_GUESS", "tokens-wrapped")
    engine = load(release)
    noticed = ["token-input-wrapped"] if newer(release, "1.2.1") else []  # 1.2.0 reports no figures

    def read() -> int:
        *_, finished = engine.generate(Request(prompt, max_new_tokens=2))
        return finished.perf.prefill_tokens if finished.perf else len(prompt)

    if noticed:
        assert read() > len(prompt)
        assert "puts its own chat template around token ids" in caplog.text
    assert read() == len(prompt)
    engine.set_chat_template("", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n")
    assert read() == len(prompt)
    assert [finding.code for finding in engine.findings] == noticed
    list(engine.generate(Request(prompt=TextPrompt("What is the RK3588?"), max_new_tokens=1)))
    assert [finding.code for finding in engine.findings] == [*noticed, "template-empty"]


@pytest.mark.parametrize("guess", ["", "context-shifts"])
@pytest.mark.parametrize("release", ["1.1.4", "1.2.3", "1.3.0"])
def test_an_endless_answer_ends_with_the_context(
    release: str, guess: str, load: Any, prompt: list[int], ids_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_GUESS", guess)
    monkeypatch.setenv("RKEMU_FAULT", "wrong-eos")
    engine = load(release, max_context=64)
    for asked in (-1, 1000):
        *tokens, finished = engine.generate(Request(prompt, max_new_tokens=asked))
        assert (finished.reason, len(tokens)) == (FinishReason.LENGTH, 64 - 4 - len(prompt))
    # Only the runtime knows how long a text is: the window may shift, but the answer ends.
    assert len(ids_of(engine.generate(Request(prompt=TextPrompt("What is the RK3588?"))))) <= 60


@pytest.mark.parametrize("release", ["1.1.4", "1.2.3"])
def test_stop_tokens_are_seen_where_special_tokens_are_not_reported(
    release: str, load: Any, prompt: list[int], demo_tokenizer: Tokenizer, ids_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "wrong-eos")  # else the emulator ends the answer itself
    request = Request(prompt, stop_tokens=frozenset({demo_tokenizer.control["<end_of_turn>"]}))
    *tokens, finished = load(release).generate(request)
    assert finished.reason is FinishReason.STOP
    monkeypatch.setenv("RKEMU_GUESS", "special-hidden")
    *again, finished = load(release).generate(request)
    assert (ids_of(again), finished.reason) == (ids_of(tokens), FinishReason.STOP)


@pytest.mark.parametrize("release", ["1.2.0", "1.2.3", "1.3.0"])
def test_no_default_of_the_library_is_relied_upon(
    release: str, load: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_GUESS", "defaults-unset")
    engine = load(release, max_context=None)
    assert engine.info.max_context == 512
    assert len(list(engine.generate(Request(prompt, max_new_tokens=2)))) == 3


def test_a_template_around_a_batch_is_noticed(load: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKEMU_GUESS", "tokens-wrapped")
    engine = load(n_batch=2)
    requests = [Request(prompt, max_new_tokens=2), Request(prompt[:9], max_new_tokens=2)]
    reads = []
    for _ in range(2):
        ends = [event for _, event in engine.generate_batch(requests) if isinstance(event, Finished)]
        reads.append(ends[-1].perf.prefill_tokens)
    assert reads[0] > reads[1] == len(prompt) + 9
    assert [finding.code for finding in engine.findings] == ["token-input-wrapped"]


@pytest.mark.parametrize("release", ["1.2.0", "1.2.3"])
def test_a_library_that_refuses_an_empty_template(
    release: str, load: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run says so where it is known to wrap token ids; where that cannot be seen, a finding does."""
    monkeypatch.setenv("RKEMU_GUESS", "tokens-wrapped")
    engine = load(release)
    ask = engine._runs._connection.ask

    def refuses(header: dict[str, Any], *rest: Any) -> Any:
        if header.get("method") == "set_chat_template":
            raise RunError("rkllm_set_chat_template returned -1.")
        return ask(header, *rest)

    engine._runs._connection.ask = refuses
    request = Request(prompt, max_new_tokens=2)
    list(engine.generate(request))
    for _ in range(2):
        if newer(release, "1.2.1"):
            with pytest.raises(RunError, match="set_chat_template"):
                list(engine.generate(request))
        else:
            list(engine.generate(request))
    codes = ["token-input-wrapped" if newer(release, "1.2.1") else "template-not-emptied"]
    assert [finding.code for finding in engine.findings] == codes
