"""RKEMU_GUESS: what boards may do instead of what the emulator usually does."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rkboard.commands.emulator import run as command
from rkboard.emulator import faults

NORMAL, FINISH, ERROR = 0, 2, 3
HIDDEN, LOGITS = 1, 2
LAYOUTS = ["1.1.4", "1.2.0", "1.2.1b1", "1.2.3", "1.3.0"]
NAMES = [guess.name for guess in faults.guesses()]


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda name: monkeypatch.setenv("RKEMU_GUESS", name)


@pytest.mark.parametrize("release", LAYOUTS)
def test_an_error_is_a_callback_and_a_status_or_a_status_alone(
    release: str, load: Any, small: Any, prompt: list[int], guess: Any
) -> None:
    usual = load(small.path, release)
    assert usual.run(prompt, lora="unknown") == -1
    assert usual.states == [ERROR]
    guess("error-status-only")
    other = load(small.path, release)
    assert other.run(prompt, lora="unknown") == -1
    assert other.states == []
    # An asynchronous run has no other way to tell.
    told = threading.Event()
    other.on_event = lambda event: told.set() or 0
    assert other.call("rkllm_run_async", [prompt], other.infer(lora="unknown")) == 0
    assert told.wait(20)
    assert other.states == [ERROR]


@pytest.mark.parametrize("release", LAYOUTS)
def test_hidden_states_before_the_end_or_with_it(
    release: str, load: Any, small: Any, prompt: list[int], guess: Any
) -> None:
    usual = load(small.path, release)
    assert usual.run(prompt, mode=HIDDEN) == 0
    before, end = (batch[0].hidden for batch in usual.events)
    assert end is None
    guess("hidden-at-finish")
    other = load(small.path, release)
    assert other.run(prompt, mode=HIDDEN) == 0
    assert other.states == [FINISH]
    np.testing.assert_array_equal(other.last.hidden, before)
    other.answer(prompt)
    assert all(batch[0].hidden is None for batch in other.events)


@pytest.mark.parametrize("release", LAYOUTS[1:])
def test_logits_with_an_answer_or_of_the_prompt_alone(
    release: str, load: Any, small: Any, prompt: list[int], guess: Any
) -> None:
    usual = load(small.path, release)
    assert usual.run(prompt, mode=LOGITS) == 0
    guess("logits-once")
    other = load(small.path, release)
    assert other.run(prompt, mode=LOGITS) == 0
    assert other.states == [NORMAL, FINISH]
    np.testing.assert_array_equal(other.events[0][0].logits, usual.events[0][0].logits)
    assert other.answer(prompt) == usual.answer(prompt)


@pytest.mark.parametrize("release", ["1.2.1", "1.2.3", "1.3.0"])
def test_a_paused_answer_that_goes_on(
    release: str, load: Any, make_model: Any, prompt: list[int], guess: Any, tmp_path: Path
) -> None:
    made = make_model(tmp_path / "m.rkemu", tie_word_embeddings=False)
    whole = load(made.path, release).answer(prompt)
    guess("pause-resumes")
    client = load(made.path, release)
    client.on_event = lambda event: 1
    parts = [client.answer(prompt)]
    for _ in range(2):
        parts.append(client.answer([9, 9, 9]))
        assert client.states == [NORMAL]
    client.on_event = lambda event: 0
    assert [token for part in parts for token in part] + client.answer([9])[:5] == whole
    assert client.answer(prompt) == whole, "a run that ended is not resumed"
    client.on_event = lambda event: 1
    client.answer(prompt)
    client.on_event = lambda event: 0
    assert client.clear() == 0
    assert client.answer(prompt) == whole, "nor one whose cache was cleared"


@pytest.mark.parametrize("release", LAYOUTS)
def test_the_status_after_an_abort(release: str, load: Any, small: Any, prompt: list[int], guess: Any) -> None:
    for name, status in [("", 0), ("abort-fails", -1)]:
        guess(name)
        client = load(small.path, release)
        expected = client.answer(prompt)
        client.on_event = lambda event, client=client: 0 * client.lib.rkllm_abort(client.handle)
        assert client.run(prompt) == status
        assert client.states == [NORMAL, FINISH]
        client.on_event = lambda event: 0
        assert client.answer(prompt) == expected


def test_calls_that_need_an_idle_handle_are_refused_or_wait(
    load: Any, small: Any, prompt: list[int], guess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_TOKEN_US", "20000")
    for name, status in [("", -1), ("calls-wait", 0)]:
        guess(name)
        client = load(small.path, max_new_tokens=20)
        started = threading.Event()
        inside: list[int] = []

        def on_event(event: Any, client: Any = client, started: Any = started, inside: Any = inside) -> int:
            if event.state == NORMAL and not inside:
                inside.append(client.clear())  # would wait for itself
                started.set()
            return 0

        client.on_event = on_event
        thread = threading.Thread(target=client.run, args=(prompt,))
        thread.start()
        assert started.wait(20)
        for call in (client.clear, lambda c=client: c.lib.rkllm_set_chat_template(c.handle, b"", b"", b"")):
            assert call() == status
            assert (FINISH in client.states) == (status == 0)
        thread.join()
        assert inside == [-1]


@pytest.mark.parametrize("release", ["1.2.0", "1.2.3"])
def test_arrays_of_the_rest_of_a_prompt_or_of_all(
    release: str, load: Any, small: Any, prompt: list[int], guess: Any
) -> None:
    for name, rows in (("", 1), ("arrays-whole", len(prompt))):
        guess(name)
        client = load(small.path, release)
        for mode in (HIDDEN, LOGITS):
            client.answer(prompt)
            assert client.run(prompt, mode=mode) == 0
            first = client.events[0][0]
            assert len(first.hidden if mode == HIDDEN else first.logits) == rows


def test_token_input_as_given_or_in_the_template(load: Any, small: Any, prompt: list[int], guess: Any) -> None:
    guess("tokens-wrapped")
    client = load(small.path)
    for texts, wrapped in (((b"", b"a b", b"c d"), True), ((b"", b"", b""), False)):
        assert client.lib.rkllm_set_chat_template(client.handle, *texts) == 0
        assert client.run(prompt) == 0
        assert (client.last.perf.prefill_tokens > len(prompt)) == wrapped


def test_a_full_context_ends_an_answer_or_shifts(load: Any, talker: Any, guess: Any) -> None:
    guess("context-shifts")
    client = load(talker.path, max_context_len=64, max_new_tokens=-1)
    seen: list[int] = []

    def until_enough(event: Any) -> int:
        seen.append(event.state)
        return client.lib.rkllm_abort(client.handle) if len(seen) == 200 else 0

    client.on_event = until_enough
    assert client.run([7] * 40) == 0
    assert len(seen) >= 200
    assert client.cache_size() <= 64


def test_defaults_that_are_set_or_not(load: Any, small: Any, guess: Any, capfd: pytest.CaptureFixture[str]) -> None:
    guess("defaults-unset")
    load(small.path, expect=-1)
    assert "Mismatch between enabled CPUs mask and expected count" in capfd.readouterr().err


def test_unknown_names_fail_the_load(load: Any, small: Any, guess: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("logits-twice", "logits-once,", "logits-once,x", "logits-once=1", " logits-once"):
        guess(name)
        load(small.path, expect=0 if name == "logits-once," else -1)
        assert ("there is no RKEMU_GUESS" in capfd.readouterr().err) == (name != "logits-once,")


def test_the_command_lists_them() -> None:
    rows = json.loads(CliRunner().invoke(command, ["info", "--guesses", "--json"]).output)
    assert [row["name"] for row in rows] == NAMES
    shown = CliRunner().invoke(command, ["info", "--guesses"])
    assert [line for line in shown.output.splitlines() if not line.startswith(" ")] == NAMES
