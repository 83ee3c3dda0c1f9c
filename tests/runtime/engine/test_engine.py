"""The whole API, over the emulator's library of every layout."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkruntime.bundle.rkemu import TensorSpec, Writer, read_container
from rkruntime.checks.preflight import ModelFacts
from rkruntime.engine.engine import Engine, LoadOptions, Lora
from rkruntime.engine.generation import (
    GREEDY,
    EmbeddingPrompt,
    Finished,
    FinishReason,
    HiddenStates,
    Logits,
    Request,
    Sampling,
    TextPrompt,
    Token,
)
from rkruntime.errors import (
    AdapterError,
    ContextFullError,
    LibraryError,
    LoadError,
    ModelFileError,
    RunError,
    UnsupportedCallError,
    UsageError,
)
from rkruntime.text.tokenizer import Tokenizer
from rkruntime.versions import version as order

Load = Callable[..., Engine]
QUESTION = "<bos><start_of_turn>user\nWhat is the RK3588?<end_of_turn>\n<start_of_turn>model\n"
ANSWER = "A Rockchip chip with eight Arm cores and an NPU of 6 TOPS."


def newer(release: str, than: str) -> bool:
    return order(release) >= order(than)


@pytest.fixture(scope="module")
def question(demo_tokenizer: Tokenizer) -> list[int]:
    control = demo_tokenizer.control
    encode = demo_tokenizer.encode
    return [
        control["<bos>"],
        control["<start_of_turn>"],
        *encode("user\nWhat is the RK3588?"),
        control["<end_of_turn>"],
        *encode("\n"),
        control["<start_of_turn>"],
        *encode("model\n"),
    ]


@pytest.fixture(scope="module")
def stops(demo_tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset({demo_tokenizer.control["<eos>"], demo_tokenizer.control["<end_of_turn>"]})


def text_of(events: list[Any]) -> str:
    return b"".join(event.text for event in events if isinstance(event, Token)).decode()


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
    engine = load(release, environment={"RKEMU_TOKEN_US": "500"})
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
        task = asyncio.create_task(_collect(engine, Request(question)))
        await asyncio.sleep(0.003)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ids_of([event async for event in engine.agenerate(Request(question, stop_tokens=stops))]) == whole
        ticking.cancel()

    asyncio.run(go())


async def _collect(engine: Engine, request: Request) -> list[Any]:
    return [event async for event in engine.agenerate(request)]


def test_asyncio_cancelled_twice(load: Load, question: list[int], ids_of: Any) -> None:
    """A run whose end nobody waited for is ended before the next one."""
    engine = load(environment={"RKEMU_TOKEN_US": "20000"})

    async def go() -> None:
        task = asyncio.create_task(_collect(engine, Request(question)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert len(ids_of(engine.generate(Request(question, max_new_tokens=3)))) == 3


# --- other prompts -----------------------------------------------------------------------------------------------


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


# --- arrays ------------------------------------------------------------------------------------------------------


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


# --- cache, history, pause ---------------------------------------------------------------------------------------


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
    engine.release_prompt_cache()
    path.write_bytes(b"damaged")
    with pytest.raises(RunError, match="rkllm_load_prompt_cache returned -1") as caught:
        engine.load_prompt_cache(path)
    assert caught.value.details["log"]
    assert ids_of(engine.generate(Request(question, max_new_tokens=6))) == expected


# --- per run, per load -------------------------------------------------------------------------------------------


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


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-2 adapter that says something else."""
    container = read_container(bundle.model)
    random = np.random.default_rng(3)
    tensors = {}
    for layer in range(4):
        columns, rows = 128, 384
        tensors[f"blk.{layer}.ffn_up.lora_a"] = random.normal(0, 0.5, (2, columns)).astype(np.float32)
        tensors[f"blk.{layer}.ffn_up.lora_b"] = random.normal(0, 0.5, (rows, 2)).astype(np.float32)
    metadata = {
        "general.kind": "adapter",
        "general.architecture": "gemma2",
        "general.name": "noise",
        "adapter.alpha": 4.0,
        "adapter.base_fingerprint": container.fingerprint,
    }
    path = tmp_path_factory.mktemp("adapter") / "noise.rkemu"
    with Writer(path, metadata, [TensorSpec(name, "float32", a.shape) for name, a in tensors.items()]) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return path


def test_lora(load: Load, release: str, adapter: Path, question: list[int], ids_of: Any) -> None:
    """Loaded with the model or later; a run has the one it names, and no other."""
    engine = load(release, loras=(Lora("noise", adapter),))
    base = ids_of(engine.generate(Request(question, max_new_tokens=12)))
    noisy = ids_of(engine.generate(Request(question, max_new_tokens=12, lora="noise")))
    assert noisy != base
    engine.load_lora(Lora("quiet", adapter, scale=0.0))
    assert ids_of(engine.generate(Request(question, max_new_tokens=12, lora="quiet"))) == base
    assert ids_of(engine.generate(Request(question, max_new_tokens=12, lora="noise"))) == noisy
    assert ids_of(engine.generate(Request(question, max_new_tokens=12))) == base
    with pytest.raises(RunError):
        list(engine.generate(Request(question, lora="unknown")))
    with pytest.raises(AdapterError, match="no adapter file"):
        engine.load_lora(Lora("none", adapter.parent / "none.rkemu"))
    with pytest.raises(RunError, match="rkllm_load_lora returned -1"):
        engine.load_lora(Lora("self", engine.options.model))
    assert ids_of(engine.generate(Request(question, max_new_tokens=12))) == base


# --- models without tokenizer or embeddings ----------------------------------------------------------------------


def test_tokenizer_callback(
    load: Load, model_without: Callable[[str], Path], demo_tokenizer: Tokenizer, stops: frozenset[int]
) -> None:
    asked: list[str] = []

    def tokenize(text: str) -> list[int]:
        asked.append(text)
        control = demo_tokenizer.control
        if "fail" in text:
            raise ValueError("no such text")
        body = text.removeprefix("<start_of_turn>user\n").removesuffix("<end_of_turn>\n<start_of_turn>model\n")
        ids = [control["<start_of_turn>"], *demo_tokenizer.encode("user\n" + body), control["<end_of_turn>"]]
        return [*ids, *demo_tokenizer.encode("\n"), control["<start_of_turn>"], *demo_tokenizer.encode("model\n")]

    engine = load("1.3.0", model=model_without("tokenizer."), tokenizer=tokenize)
    *tokens, finished = engine.generate(Request(prompt=TextPrompt("What is the RK3588?"), stop_tokens=stops))
    assert demo_tokenizer.decode([token.token_id for token in tokens]) == ANSWER
    assert asked == ["<start_of_turn>user\nWhat is the RK3588?<end_of_turn>\n<start_of_turn>model\n"]
    assert finished.reason is FinishReason.STOP

    async def go() -> list[Any]:
        return await _collect(engine, Request(prompt=TextPrompt("What is the RK3588?"), stop_tokens=stops))

    with pytest.raises(RunError, match="no such text"):
        list(engine.generate(Request(prompt=TextPrompt("fail"))))
    assert [event.token_id for event in asyncio.run(go())[:-1]] == [token.token_id for token in tokens]


def test_embedding_callback(
    load: Load, model_without: Callable[[str], Path], bundle: Any, question: list[int], ids_of: Any
) -> None:
    container = read_container(bundle.model)
    table = container.read("token_embd").astype(np.float32) * container.read("token_embd.scale")
    whole = _untied(container, bundle.model.parent.parent / "untied.rkemu", table)
    expected = ids_of(load("1.3.0", model=bundle.model).generate(Request(question, max_new_tokens=8)))
    calls: list[int] = []

    def embed(ids: Any) -> Any:
        calls.extend(ids)
        return table[list(ids)]

    engine = load("1.3.0", model=whole, embed=embed)
    assert ids_of(engine.generate(Request(question, max_new_tokens=8))) == expected
    assert calls[: len(question)] == question
    broken = load("1.3.0", model=whole, embed=lambda ids: table[:0])
    with pytest.raises(UsageError, match="returned 0 bytes; the runtime needs 512"):
        list(broken.generate(Request(question)))


def _untied(container: Any, path: Path, table: Any) -> Path:
    """The model with its head as a tensor of its own, and no embedding table."""
    kept = {name: entry.spec for name, entry in container.tensors.items() if not name.startswith("token_embd")}
    head = container.tensors["token_embd"].spec, container.tensors["token_embd.scale"].spec
    specs = [
        *kept.values(),
        TensorSpec("output", "int8", head[0].shape),
        TensorSpec("output.scale", "float32", head[1].shape),
    ]
    with Writer(path, container.metadata, specs) as writer:
        for name in kept:
            writer.write(name, container.read(name))
        writer.write("output", container.read("token_embd"))
        writer.write("output.scale", container.read("token_embd.scale"))
    return path


# --- loads that fail ---------------------------------------------------------------------------------------------


def test_loads_that_the_library_refuses(load: Load, release: str, tmp_path: Path, bundle: Any) -> None:
    with pytest.raises(LoadError, match="rkllm_init returned -1") as caught:
        load(release, max_context=8192)
    assert caught.value.details["diagnosis"]["class"] == "context-limit"
    damaged = tmp_path / "model.rkllm"
    damaged.write_bytes(b"no model" * 1000)
    with pytest.raises(LoadError) as caught:
        load(release, model=damaged)
    assert caught.value.details["diagnosis"]["class"] in ("model-file-invalid", "model-runtime-version-mismatch")
    load(release)


def test_files_that_are_not_there(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model file"):
        load(model=tmp_path / "none.rkllm")
    with pytest.raises(LibraryError, match="cannot be read"):
        load(library=tmp_path / "librkllmrt.so")


def test_preflight_is_asked(load: Load, bundle: Any) -> None:
    known = bundle.known
    engine = load(known=known, max_context=8192)
    assert engine.info.max_context == known.max_context
    assert [finding.code for finding in engine.info.findings] == ["context-clamped"]
    assert isinstance(known, ModelFacts)


def test_closed_engines(load: Load, question: list[int]) -> None:
    engine = load()
    engine.close()
    engine.close()
    engine.abort()
    with pytest.raises(RunError, match="closed"):
        list(engine.generate(Request(question)))
    with pytest.raises(RunError, match="closed"):
        engine.cache_sizes()
    assert engine.log


def test_close_during_a_run(load: Load, question: list[int]) -> None:
    engine = load(environment={"RKEMU_TOKEN_US": "5000"})
    events = engine.generate(Request(question))
    next(events)
    engine.close()
    assert not Path(f"/proc/{engine._connection.worker.process.pid}").exists()
    with pytest.raises((RunError, StopIteration)):
        for _ in range(2):
            next(events)


def test_two_models_at_once(load: Load, question: list[int], ids_of: Any) -> None:
    one, other = load("1.2.3"), load("1.3.0")
    first, second = (
        one.generate(Request(question, max_new_tokens=6)),
        other.generate(Request(question, max_new_tokens=6)),
    )
    pairs = [(a.token_id, b.token_id) for a, b in zip(first, second, strict=False) if isinstance(a, Token)]
    assert len(pairs) == 6
    assert all(a == b for a, b in pairs)
    first.close()
    second.close()
