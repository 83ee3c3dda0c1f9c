"""Answers over the library of every layout: tokens, ends, aborts, asyncio, settings of a run and of a load."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.runtime.engine.misbehaviour import delivered
from tests.runtime.engine.one_question import ANSWER, Load, collect, newer, text_of

from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import (
    GREEDY,
    Finished,
    FinishReason,
    Request,
    Sampling,
    TextPrompt,
)
from rkruntime.errors import (
    ContextFullError,
    LoadError,
    RunError,
    UnsupportedCallError,
    UsageError,
)
from rkruntime.text.tokenizer import Tokenizer


def test_an_answer(load: Load, release: str, question: list[int], stops: frozenset[int]) -> None:
    engine = load(release)
    for _ in range(3):  # the state after a stop is clean
        *tokens, finished = engine.generate(Request(question, stop_tokens=stops))
        assert text_of(tokens) == ANSWER
        assert finished.reason is FinishReason.STOP
        assert finished.prompt_tokens == len(question)
        assert finished.generated_tokens == len(tokens)
        assert stops.isdisjoint(token.token_id for token in tokens)
        assert (finished.perf is not None) == newer(release, "1.2.1")


def test_what_is_known_of_a_loaded_model(load: Load, release: str) -> None:
    info = load(release).info
    assert (info.release, info.runtime_version, info.driver_version) == (release, release, "0.9.8")
    assert (info.platform, info.npu_cores, info.toolkit_version) == ("RK3588", 3, "1.2.3")
    assert (info.max_context, info.max_context_limit) == (512, 4096)
    assert info.dtype == ("W8A8" if newer(release, "1.2.1") else "")
    assert info.emulated
    assert info.load_seconds > 0
    assert any("loading rkllm model" in line for line in info.log)


def test_stop_tokens_end_a_run_on_every_release(load: Load, release: str, question: list[int], ids_of: Any) -> None:
    """Any token may be a stop, wherever it comes; nothing behind it arrives."""
    engine = load(release)
    whole = ids_of(engine.generate(Request(question, max_new_tokens=12)))
    for at in (0, 1, 5):
        stop = whole[at]
        events = list(engine.generate(Request(question, stop_tokens=frozenset({stop}))))
        assert ids_of(events) == whole[: whole.index(stop)]
        assert events[-1].reason is FinishReason.STOP
        assert events[-1].generated_tokens == whole.index(stop)


def test_length(load: Load, release: str, question: list[int], ids_of: Any) -> None:
    engine = load(release)
    whole = ids_of(engine.generate(Request(question, max_new_tokens=9)))
    for count in (1, 2, 9):
        *tokens, finished = engine.generate(Request(question, max_new_tokens=count))
        assert ids_of(tokens) == whole[:count]
        assert (finished.reason, finished.generated_tokens) == (FinishReason.LENGTH, count)


def test_length_of_the_load_and_of_the_context(load: Load, release: str, question: list[int]) -> None:
    *tokens, finished = load(release, max_new_tokens=4).generate(Request(question))
    assert (finished.reason, len(tokens)) == (FinishReason.LENGTH, 4)
    full = load(release, max_context=64)
    # No stop at all: the run goes on until the context is full.
    *tokens, finished = full.generate(Request(question * 2, stop_tokens=frozenset()))
    if finished.reason is FinishReason.LENGTH:
        assert len(question) * 2 + len(tokens) >= 64
    with pytest.raises(
        ContextFullError, match=r"prompt has \d+ tokens, but prompt and answer together must fit into 64"
    ):
        list(full.generate(Request([*question] * 4)))


def test_closing_an_iterator_aborts(
    load: Load, release: str, question: list[int], ids_of: Any, stops: frozenset[int]
) -> None:
    engine = load(release)
    whole = ids_of(engine.generate(Request(question, stop_tokens=stops)))
    for taken in (1, 3):
        events = engine.generate(Request(question, max_new_tokens=400))
        assert [next(events).token_id for _ in range(taken)] == whole[:taken]
        assert engine.running
        assert engine.is_running()
        events.close()
        assert not engine.running
        assert not engine.is_running()
        assert ids_of(engine.generate(Request(question, stop_tokens=stops))) == whole


def test_abort_from_another_thread(load: Load, release: str, question: list[int]) -> None:
    engine = load(release, environment={"RKEMU_TOKEN_US": "20000"})
    events = engine.generate(Request(question))
    next(events)
    threading.Timer(0.02, engine.abort).start()
    *_, finished = events
    assert finished.reason is FinishReason.ABORT
    engine.abort()  # without a run it does nothing
    *_, finished = engine.generate(Request(question, max_new_tokens=2))
    assert finished.reason is FinishReason.LENGTH


def test_one_run_at_a_time(load: Load, question: list[int]) -> None:
    engine = load()
    events = engine.generate(Request(question))
    next(events)
    with pytest.raises(RunError, match="run is in progress"):
        next(engine.generate(Request(question)))
    with pytest.raises(RunError, match="in progress"):
        engine.clear_cache()
    events.close()
    engine.clear_cache()


def test_a_character_over_several_tokens(
    load: Load, release: str, demo_tokenizer: Tokenizer, stops: frozenset[int]
) -> None:
    control, encode = demo_tokenizer.control, demo_tokenizer.encode
    prompt = [control["<bos>"], control["<start_of_turn>"], *encode("user\nDoes it work?"), control["<end_of_turn>"]]
    prompt += [*encode("\n"), control["<start_of_turn>"], *encode("model\n")]
    *tokens, finished = load(release).generate(Request(prompt, stop_tokens=stops))
    assert text_of(tokens) == "Yes, it works 🚀"
    # The bytes of the rocket came as tokens without text of their own, and count.
    assert sum(token.text == b"" for token in tokens) >= 3
    assert finished.generated_tokens == len(tokens)


# --- asyncio -----------------------------------------------------------------------------------------------------


def test_asyncio(load: Load, release: str, question: list[int], ids_of: Any, stops: frozenset[int]) -> None:
    engine = load(release, environment={"RKEMU_TOKEN_US": "5000"})
    whole = ids_of(engine.generate(Request(question, stop_tokens=stops)))

    async def go() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.0005)

        ticking = asyncio.create_task(tick())
        assert ids_of([event async for event in engine.agenerate(Request(question, stop_tokens=stops))]) == whole
        assert ticks > 3  # the loop went on in the meantime
        events = engine.agenerate(Request(question))
        assert (await anext(events)).token_id == whole[0]
        await events.aclose()
        assert not engine.running
        task = asyncio.create_task(collect(engine, Request(question)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ids_of([event async for event in engine.agenerate(Request(question, stop_tokens=stops))]) == whole
        ticking.cancel()

    asyncio.run(go())


def test_events_are_handed_over(load: Load, question: list[int], stops: frozenset[int]) -> None:
    """Without a task: the same events, and a run ends with whoever takes no more of it."""
    engine = load(environment={"RKEMU_TOKEN_US": "2000"})
    request = Request(question, stop_tokens=stops)
    whole = list(engine.generate(request))

    async def go() -> None:
        assert without_perf(await delivered(engine, request)) == without_perf(whole)
        for wanted in (0, 1, 3):
            taken: list[Any] = []

            def few(events: list[Any], taken: list[Any] = taken, wanted: int = wanted) -> bool:
                taken.extend(events)
                return len(taken) < wanted

            await engine.deliver(Request(question), few)
            assert not engine.running
            assert 0 < len(taken) < len(whole)
        with pytest.raises(ZeroDivisionError):
            await engine.deliver(Request(question), lambda events: 1 / 0 > 0)
        assert not engine.running
        task = asyncio.create_task(delivered(engine, Request(question)))
        await asyncio.sleep(0.02)
        with pytest.raises(RunError, match="in progress"):
            await delivered(engine, request)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert without_perf(await delivered(engine, request)) == without_perf(whole)

    asyncio.run(go())


def without_perf(events: list[Any]) -> list[Any]:
    return [replace(event, perf=None) if isinstance(event, Finished) else event for event in events]


def test_asyncio_cancelled_twice(load: Load, question: list[int], ids_of: Any) -> None:
    """A run whose end nobody waited for is ended before the next one."""
    engine = load(environment={"RKEMU_TOKEN_US": "20000"})

    async def go() -> None:
        task = asyncio.create_task(collect(engine, Request(question)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert len(ids_of(engine.generate(Request(question, max_new_tokens=3)))) == 3


def test_sampling_per_run(load: Load, release: str, question: list[int], ids_of: Any) -> None:
    engine = load(release)
    expected = ids_of(engine.generate(Request(question, max_new_tokens=8, sampling=GREEDY)))
    hot = Request(question, max_new_tokens=8, sampling=Sampling(temperature=5.0, top_k=500, top_p=1.0))
    if newer(release, "1.3.0"):
        assert any(ids_of(engine.generate(hot)) != expected for _ in range(5))
        assert ids_of(engine.generate(Request(question, max_new_tokens=8))) == expected
    else:
        with pytest.raises(
            UnsupportedCallError, match=rf"per run requires release 1\.3\.0 or later; this library is {release}"
        ):
            list(engine.generate(hot))


def test_sampling_of_the_load(load: Load, release: str, question: list[int], ids_of: Any) -> None:
    """Every field arrives where the layout has it: greedy repeats itself, hot sampling does not."""
    greedy = [ids_of(load(release).generate(Request(question, max_new_tokens=8))) for _ in range(2)]
    assert greedy[0] == greedy[1]
    hot = load(release, sampling=Sampling(temperature=5.0, top_k=500, top_p=1.0, repeat_penalty=1.0))
    assert any(ids_of(hot.generate(Request(question, max_new_tokens=8))) != greedy[0] for _ in range(5))


def test_an_answer_ends_with_its_context(load: Load, question: list[int]) -> None:
    """Allowed more tokens than it has room for, 1.3.0 would drop the start of the conversation and go on."""
    hot = Sampling(temperature=5.0, top_k=500, top_p=1.0, repeat_penalty=1.0)
    kept, slid = load("1.3.0", max_context=64, sampling=hot), load("1.3.0", max_context=64, sampling=hot, n_keep=0)
    request = Request(question, max_new_tokens=1000)
    assert all(len(list(kept.generate(request))) <= 65 for _ in range(5))
    assert any(len(list(slid.generate(request))) > 65 for _ in range(5))


def test_a_continued_conversation_ends_with_its_context(load: Load, question: list[int]) -> None:
    """Only the runtime knows how full its context is: a limit beyond it would drop the start, so none is passed on."""
    hot = Sampling(temperature=5.0, top_k=500, top_p=1.0, repeat_penalty=1.0)
    engine = load("1.3.0", max_context=64, sampling=hot)
    for _ in range(5):
        engine.clear_cache()
        list(engine.generate(Request(question, max_new_tokens=1, keep_history=True)))
        room = 64 - engine.cache_sizes()[0] - len(question)
        *tokens, _ = engine.generate(Request(question, max_new_tokens=1000, keep_history=True))
        assert 0 < len(tokens) <= room + 1


def test_fields_that_a_release_lacks(load: Load, release: str) -> None:
    for changes, since in (
        ({"n_keep": 4}, "1.2.0"),
        ({"cpus": (0, 1, 2)}, "1.2.0"),
        ({"embed_flash": True}, "1.2.0"),
        ({"n_batch": 2}, "1.2.1"),
        ({"use_cross_attention": True}, "1.2.1"),
        ({"ignore_eos": True}, "1.3.0"),
        ({"tokenizer": lambda text: [1]}, "1.3.0"),
    ):
        if newer(release, since):
            load(release, **changes).close()
        else:
            with pytest.raises(UnsupportedCallError, match=since.replace(".", r"\.")):
                load(release, **changes)
    markers = {"image_markers": ("<a>", "</a>", "<b>")}
    if newer(release, "1.3.0"):
        with pytest.raises(UnsupportedCallError, match=r"img_start"):
            load(release, **markers)
    else:
        load(release, **markers).close()


def test_every_cpu_field_arrives(load: Load) -> None:
    with pytest.raises(LoadError) as caught:
        load("1.2.3", cpus=(0, 1))
    assert any("number of enabled CPUs must be greater" in line for line in caught.value.details["log"])
    assert caught.value.details["diagnosis"]["class"] == "cpu-cores-below-npu-cores"


def test_batches(
    load: Load, release: str, question: list[int], demo_tokenizer: Tokenizer, stops: frozenset[int]
) -> None:
    if not newer(release, "1.2.1"):
        return
    single = list(load(release).generate(Request(question, stop_tokens=stops)))
    engine = load(release, n_batch=3)
    other = [*question[:-4], *question[-4:]]
    requests = [
        Request(question, stop_tokens=stops),
        Request(question[:9], stop_tokens=stops),
        Request(other, stop_tokens=stops),
    ]
    events = list(engine.generate_batch(requests))
    for batch in (0, 2):
        *tokens, finished = [event for number, event in events if number == batch]
        assert text_of(tokens) == text_of(single)
        assert (finished.reason, finished.generated_tokens) == (FinishReason.STOP, len(tokens))
    assert sum(isinstance(event, Finished) for _, event in events) == 3
    assert len(engine.cache_sizes()) == 3
    with pytest.raises(UsageError, match="loaded for 3 prompts"):
        list(engine.generate(Request(question)))
    with pytest.raises(UsageError, match="share their settings"):
        list(engine.generate_batch([requests[0], requests[1], replace(other_request(other), max_new_tokens=3)]))
    engine.clear_cache()
    assert engine.cache_sizes() == [0, 0, 0]


def other_request(tokens: list[int]) -> Request:
    return Request(tokens)


def test_asynchronous(load: Load, release: str, question: list[int], stops: frozenset[int]) -> None:
    """rkllm_run_async: the callbacks come from a thread of the library's own."""
    engine = load(release, asynchronous=True)
    for _ in range(2):
        *tokens, finished = engine.generate(Request(question, stop_tokens=stops))
        assert text_of(tokens) == ANSWER
        assert finished.reason is FinishReason.STOP
    with closing(engine.generate(Request(question))) as events:
        next(events)


def test_chat_template_and_tools(load: Load, release: str, stops: frozenset[int]) -> None:
    engine = load(release)
    request = Request(prompt=TextPrompt("What is the RK3588?"), stop_tokens=stops)
    if newer(release, "1.2.0"):
        engine.set_chat_template("", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n")
        assert text_of(list(engine.generate(request))) == ANSWER
        engine.set_chat_template("", "", "")
        assert text_of(list(engine.generate(replace(request, max_new_tokens=20)))) != ANSWER
    else:
        with pytest.raises(UnsupportedCallError, match="rkllm_set_chat_template"):
            engine.set_chat_template("", "", "")
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    if newer(release, "1.2.1"):
        engine.set_function_tools("You have tools.", tools, "tool_response")
    else:
        with pytest.raises(UnsupportedCallError, match=r"rkllm_set_function_tools requires release 1\.2\.1"):
            engine.set_function_tools("You have tools.", tools, "tool_response")


def test_cross_attention(load: Load, misbehaving: Callable[..., LoadOptions], release: str) -> None:
    k = np.arange(6, dtype=np.float32).reshape(1, 3, 2) + 1
    mask, positions = np.array([0.0, -1.0, 0.0], np.float32), np.array([4, 5, 6], np.int32)
    if not newer(release, "1.2.1"):
        with pytest.raises(UnsupportedCallError, match="rkllm_set_cross_attn_params"):
            load(release).set_cross_attention(k, k, mask, positions)
        return
    with pytest.raises(RunError, match="rkllm_set_cross_attn_params returned -1"):
        load(release).set_cross_attention(k, k, mask, positions)  # Gemma 2 has none
    with Engine.load(misbehaving("", release)) as engine:
        engine.set_cross_attention(k, k * 2, mask, positions)
        assert engine.log[-1] == "cross attention: 3 tokens, k 2, v 4, mask -1, position 5"
