"""Whatever a program gives to the public API: it works, or it is one of our errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rkruntime
from rkruntime import LoadOptions, Lora, Message, Request, RuntimeOptions, Sampling, SamplingOptions
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import BundleError, RKEdgeError, UsageError
from rkruntime.testing import FakeEngine, fake_model

from .engine.conftest import bundle  # noqa: F401  # a fixture

NAN = float("nan")
# Keys that no function has as a parameter, texts that no file is called.
_texts = st.text(max_size=8).map(lambda text: f"/no/such/{text}") | st.sampled_from(["", "a\0b", "\ud800", "x" * 5000])
_numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**40, 2**70, 10**4000, 1e39, -0.0, NAN])
_plain = st.none() | st.booleans() | _numbers | _texts | st.binary(max_size=3)
VALUES = st.recursive(
    _plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
few = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def _taken(call: Callable[[], object]) -> bool:
    """Whether a call works; whatever it raises is an error of ours."""
    try:
        call()
    except RKEdgeError as error:
        assert str(error)
        return False
    return True


@pytest.mark.parametrize(
    "kind",
    [Sampling, SamplingOptions, RuntimeOptions, Request, Lora, LoadOptions, Message],
    ids=lambda kind: kind.__name__,
)
@few
@given(data=st.data())
def test_records_take_only_what_they_declare(kind: Any, data: Any) -> None:
    needed = {Lora: {"name": "a", "path": "b"}, LoadOptions: {"library": "a", "model": "b"}}
    given = {**needed.get(kind, {}), **({"role": "user", "content": "a"} if kind is Message else {})}
    name = data.draw(st.sampled_from([item.name for item in fields(kind)]))
    _taken(lambda: kind(**{**given, name: data.draw(VALUES)}))


@few
@example("question", None)
@example("question", [Message("user", "a"), 5])
@example("stop", [None])
@example("stop", {"a": 1})
@example("sampling", "x")
@example("sampling", {"temperature": 1})
@given(st.sampled_from(["question", "stop", "sampling", "max_new_tokens", "system", "drop_oldest"]), VALUES)
def test_questions(name: str, value: Any) -> None:
    model = fake_model("one", "two", "three")

    async def stream(question: Any = "hi", **wishes: Any) -> None:
        async for _ in model.astream(question, **wishes):
            pass

    if name in ("system", "drop_oldest"):
        _taken(lambda: model.chat(**{name: value}).ask("hi"))
        return
    taken = _taken(lambda: model.ask(**{"question": "hi", name: value}))
    assert taken == _taken(lambda: asyncio.run(stream(**{name: value})))
    if name != "sampling":
        chat = model.chat()
        name = "text" if name == "question" else name
        if not _taken(lambda: chat.ask(**{"text": "hi", name: value})):
            assert chat.conversation.messages == []


@few
@example("a\0b")
@example("\ud800")
@given(value=VALUES)
def test_files_logs_and_machines(fake_bundle: Bundle, tmp_path: Path, value: Any) -> None:
    talk = fake_model().chat().conversation
    for call in (
        rkruntime.open_bundle,
        rkruntime.open_model,
        rkruntime.identify,
        rkruntime.diagnose,
        rkruntime.preflight,
        talk.load,
        talk.restore,
        lambda path: talk.save(tmp_path / "talk" if isinstance(path, (str, type(None))) else path),
        lambda given: talk.prompt(given, 512),
        lambda given: talk.prompt("hi", given),
        lambda given: fake_bundle.verify(names=given),
        lambda given: fake_bundle.verify(progress=given),
        lambda given: rkruntime.preflight(fake_bundle.known, runtime=given),
        lambda given: rkruntime.preflight(fake_bundle.known, context=given),
        lambda given: rkruntime.preflight(fake_bundle.known, allowed=given),
        lambda given: rkruntime.diagnose("log", context=given),
        lambda given: rkruntime.identify(tmp_path, release=given),
        lambda given: rkruntime.open_model(fake_bundle, given or 1),
        lambda given: rkruntime.open_model(fake_bundle, sampling=given or 1),
    ):
        _taken(lambda call=call: call(value))  # type: ignore[misc]


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Iterator[rkruntime.Model]:  # noqa: F811
    with rkruntime.open_model(bundle) as model:
        yield model


@few
@example([])
@example({2**70})
@given(value=VALUES)
def test_engines(model: rkruntime.Model, value: Any) -> None:
    """Nothing that is given to one ends its worker either."""
    engine = model.engine

    def run(tokens: Any = (2, 5), **wishes: Any) -> list[Any]:
        return list(engine.generate(Request(tokens, **{"max_new_tokens": 1, **wishes})))

    async def gathered(request: Any) -> list[Any]:
        return [event async for event in engine.agenerate(request)]

    def delivered(request: Any) -> list[Any]:
        events: list[Any] = []
        asyncio.run(engine.deliver(request, lambda some: events.extend(some) or True))  # type: ignore[func-returns-value]
        return events

    for call in (
        run,
        lambda given: run(stop_tokens=given),
        lambda given: run(pause_tokens=given),
        lambda given: run(lora=given),
        lambda given: run((), prompt=given),
        lambda given: list(engine.generate(given)),
        lambda given: list(engine.generate_batch(given)),
        lambda given: list(engine.generate_arrays(Request((2, 5), 1), given)),
        lambda given: asyncio.run(gathered(given)),
        delivered,
        lambda given: asyncio.run(engine.deliver(Request((2, 5), 1), given)),
        engine.logits,
        engine.load_lora,
        engine.load_prompt_cache,
        lambda given: engine.set_function_tools("", given, ""),
        lambda given: engine.set_chat_template("", given, ""),
        lambda given: engine.clear_cache(ranges=given),
        lambda given: engine.clear_cache(keep_system_prompt=given),
        rkruntime.Engine.load,
    ):
        _taken(lambda call=call: call(value))  # type: ignore[misc]
    assert engine.alive


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": NAN},
        {"temperature": 1e39},
        {"temperature": None},
        {"top_k": 0},
        {"top_k": 2**40},
        {"top_k": 10**5000},
        {"top_k": 1.5},
        {"top_p": 5},
        {"mirostat": 7},
        {"mirostat_tau": NAN},
        {"frequency_penalty": 99},
        {"presence_penalty": "1"},
        {"repeat_penalty": NAN},
        {"repeat_penalty": -3},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_sampling_that_nothing_can_do(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_question_has_options_or_a_whole_sampling() -> None:
    model = fake_model("one two three", "two", "three")
    assert isinstance(model.engine, FakeEngine)
    assert len(model.ask("?", sampling=SamplingOptions(temperature=0.5, max_new_tokens=3)).tokens) == 3
    model.ask("?", sampling=SamplingOptions(repeat_penalty=1.5), max_new_tokens=2)
    model.ask("?", sampling=Sampling(top_k=3))
    assert [(request.sampling, request.max_new_tokens) for request in model.engine.requests] == [
        (Sampling(temperature=0.5), 3),
        (Sampling(0.0, 1, 1.0, 1.5), 2),
        (Sampling(top_k=3), -1),
    ]


def test_what_used_to_be_taken_for_something_else(fake_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="does not list nope"):
        fake_bundle.verify(names=["nope"])
    for call in (
        lambda: fake_bundle.verify(names="tokenizer.json"),
        lambda: rkruntime.preflight(fake_bundle.known, runtime="banana"),
        lambda: fake_model("x").chat(drop_oldest="no"),  # type: ignore[arg-type]
        lambda: fake_model("x").ask("?", max_new_tokens=2**31),
        lambda: LoadOptions(Path("a"), Path("b"), token_timeout=NAN),
        lambda: LoadOptions(Path("a"), Path("b"), load_timeout=0),
        lambda: LoadOptions(Path("a"), Path("b"), max_context=2**31),
        lambda: Request([1], max_new_tokens=-2),
    ):
        with pytest.raises(UsageError):
            call()
    assert Request([1], save_prompt_cache="x").save_prompt_cache == Path("x")
