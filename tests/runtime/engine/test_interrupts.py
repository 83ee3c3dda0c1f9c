"""Who ends whose run: Ctrl-C at any moment, iterators that are forgotten, tasks that are cancelled, loops that stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.runtime.conftest import Interrupt, interrupt

import rkruntime
from rkruntime.bundle.manifest import Bundle
from rkruntime.engine.engine import Engine
from rkruntime.engine.generation import Finished, FinishReason, Request, TextPrompt
from rkruntime.engine.open import SamplingOptions
from rkruntime.errors import ContextFullError, RunError, WorkerError
from rkruntime.model import Model, open_model

# Python only prints what is raised while an object is collected.
UNRAISABLE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# "What is the RK3588?" for the demo model.
QUESTION = [2, 106, 451, 364, 472, 474, 441, 477, 373, 375, 378, 378, 381, 107, 364, 106, 443, 364]
# Where steps are counted: Python's own context managers run ours.
PLACES = (str(Path(rkruntime.__file__).parent), contextlib.__file__)
REQUEST, SHORT = Request(QUESTION, max_new_tokens=12), Request(QUESTION, max_new_tokens=3)


@pytest.fixture
def engine(load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("RKEMU_TOKEN_US", "10000")
    return load(token_timeout=4.0)  # what hangs is lost


def ids(events: Any) -> list[Any]:
    return [*events]


@UNRAISABLE
@pytest.mark.parametrize("seed", range(3))
def test_no_answer_is_another_ones(bundle: Bundle, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupt at any moment each question gets its own answer, from this model or from one opened again."""
    monkeypatch.setenv("RKEMU_TOKEN_US", "1000")
    rng = random.Random(seed)
    questions = ["What is the RK3588?", "What is prefill?", "What is an NPU?", "What is a tokenizer? " * 200]

    def fresh() -> Model:
        return open_model(bundle, sampling=SamplingOptions(temperature=0, max_new_tokens=8))

    model = fresh()
    expected = {question: model.ask(question).text for question in questions}
    reopened = 0
    try:
        for _ in range(40):
            interrupt(rng.uniform(0.0001, 0.02), partial(model.ask, rng.choice(questions)))
            question = rng.choice(questions)
            try:
                assert model.ask(question).text == expected[question]
            except (RunError, WorkerError):
                assert not model.engine.alive  # it says so, and can be opened again
                model.close()
                model, reopened = fresh(), reopened + 1
        assert reopened < 20
    finally:
        model.close()


class Steps:
    """A profile function that interrupts the runtime once, where a signal could: as a function begins or C returns.

    Python looks for signals there and at the end of a loop's body, but not between two assignments, nor as a generator
    begins to close.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self._closes = False

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        closes, self._closes = self._closes, event == "c_call" and called.__name__ == "close"
        if event == "c_return" or (event == "call" and not closes):
            self.left -= frame.f_code.co_filename.startswith(PLACES)
            if self.left == 0:
                self.left = -1
                raise Interrupt


def interrupt_steps(first: int, stride: int, opened: Callable[[], Any], asked: Callable[[Any], Any]) -> None:
    """Interrupt a question at one step after the other. The next answer is right, from the same model."""
    model = opened()
    asked(model)  # shows whether the template must be emptied
    expected, step, steps = asked(model), first, Steps(0)
    while steps.left <= 0:
        steps = Steps(step)
        sys.setprofile(steps)
        try:
            asked(model)
        except Interrupt:
            sys.setprofile(None)
            assert asked(model) == expected  # while the error still holds what it went through
        finally:
            sys.setprofile(None)
        step += stride
        assert asked(model) == expected
    model.close()
    assert step > 100


Case = tuple[Callable[[], Any], Callable[[Any], Any]]


@pytest.fixture(params=["generate", "closed", "logits", "callback", "wrapped", "ask", "stop"])
def case(
    request: pytest.FixtureRequest,
    bundle: Bundle,
    load: Callable[..., Engine],
    model_without: Callable[[str], Path],
    ids_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> Case:
    """How to open a model, and a question to it."""

    def callback() -> Engine:
        return load("1.3.0", model=model_without("tokenizer"), tokenizer=lambda text: QUESTION, token_timeout=4.0)

    def wrapped(engine: Engine) -> list[int]:
        engine.set_chat_template("", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n")
        return ids_of(engine.generate(SHORT))

    def closed(engine: Engine) -> Any:
        events = engine.generate(REQUEST)
        first = next(events)
        events.close()
        return first

    if request.param == "wrapped":
        monkeypatch.setenv("RKEMU_GUESS", "tokens-wrapped")
    sampling = SamplingOptions(temperature=0, max_new_tokens=3)
    text = Request(prompt=TextPrompt("What is the RK3588?"), max_new_tokens=3)
    cases: dict[str, Case] = {
        "generate": (lambda: load(token_timeout=4.0), lambda engine: ids_of(engine.generate(SHORT))),
        "closed": (lambda: load(token_timeout=4.0), closed),
        "logits": (lambda: load(token_timeout=4.0), lambda engine: engine.logits(SHORT).tolist()),
        "wrapped": (lambda: load("1.2.0", token_timeout=4.0), wrapped),
        "callback": (callback, lambda engine: ids_of(engine.generate(text))),
        "ask": (lambda: open_model(bundle, sampling=sampling), lambda model: model.ask("What is prefill?").text),
        "stop": (
            lambda: open_model(bundle, sampling=sampling),
            lambda model: model.ask("What is an NPU?", stop=" ").text,
        ),
    }
    return cases[request.param]


@UNRAISABLE
def test_an_interrupt_at_some_steps(case: Case) -> None:
    interrupt_steps(3, 11, *case)


@UNRAISABLE
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_interrupt_at_each_step(case: Case) -> None:
    interrupt_steps(1, 1, *case)


def test_an_abort_that_overtakes_its_run(engine: Engine) -> None:
    """The worker reads commands while it computes, or is still busy with the one before."""
    ids(engine.generate(SHORT))  # shows whether the template must be emptied, which is a command of its own
    expected = ids(engine.generate(SHORT))[:-1]
    engine._connection.send({"call": "abort", "run": engine._connection.number + 1})
    (finished,) = engine.generate(REQUEST)
    assert (finished.reason, finished.generated_tokens) == (FinishReason.ABORT, 0)
    assert ids(engine.generate(SHORT))[:-1] == expected


def test_a_forgotten_async_iterator(engine: Engine) -> None:
    """Python closes it some time later, when another run has long begun."""
    expected = ids(engine.generate(SHORT))[:-1]

    async def main() -> None:
        for _ in range(5):
            async for _ in engine.agenerate(REQUEST):
                break
            assert [event async for event in engine.agenerate(SHORT)][:-1] == expected
        await asyncio.sleep(1.2)
        assert engine.alive

    asyncio.run(main())
    assert ids(engine.generate(SHORT))[:-1] == expected


def test_a_cancelled_task_and_the_next_one(engine: Engine) -> None:
    expected = ids(engine.generate(SHORT))[:-1]

    async def collect(request: Request) -> list[Any]:
        return [event async for event in engine.agenerate(request)][:-1]

    async def main() -> None:
        for wait in (0.0, 0.005, 0.02, 0.05):
            first = asyncio.create_task(collect(REQUEST))
            await asyncio.sleep(wait)
            first.cancel()
            await asyncio.sleep(0)
            assert await collect(SHORT) == expected
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(first, 3)
            first = asyncio.create_task(collect(REQUEST))
            await asyncio.sleep(wait)
            first.cancel()
            await asyncio.sleep(0)
            engine.is_running()
            engine.clear_cache()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(first, 3)

    asyncio.run(main())
    assert engine.alive


def test_an_iterator_whose_run_is_over_ends_no_other(engine: Engine) -> None:
    expected = ids(engine.generate(SHORT))

    def over() -> Any:
        events = engine.generate(SHORT)
        for event in events:
            if isinstance(event, Finished):
                break
        return events

    for end in (lambda events: events.close(), lambda events: None):
        old = over()
        found = []
        for event in engine.generate(SHORT):
            if old is not None:
                end(old)
                old = None
                gc.collect()
            found.append(event)
        assert found[:-1] == expected[:-1]


def test_an_iterator_whose_run_is_over_in_another_thread(engine: Engine) -> None:
    expected = ids(engine.generate(REQUEST))[:-1]
    old = engine.generate(SHORT)
    while not isinstance(next(old), Finished):
        pass
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(REQUEST)))
    thread.start()
    time.sleep(0.03)
    old.close()
    thread.join(20)
    assert found[:-1] == expected


def test_a_loop_that_is_closed_in_the_middle(engine: Engine) -> None:
    expected = ids(engine.generate(SHORT))[:-1]
    loop = asyncio.new_event_loop()
    events = engine.agenerate(REQUEST)
    loop.run_until_complete(anext(events))
    with pytest.raises(RunError, match="Another run"):
        engine.clear_cache()
    loop.close()
    assert ids(engine.generate(SHORT))[:-1] == expected


@pytest.mark.parametrize("release", ["1.2.3", "1.3.0"])
def test_a_continued_prompt_that_does_not_fit(release: str, load: Callable[..., Engine]) -> None:
    engine = load(release, max_context=64)
    ids(engine.generate(SHORT))  # a template that is noticed in a conversation stays until its end
    engine.clear_cache()
    ids(engine.generate(Request(QUESTION, max_new_tokens=4, keep_history=True)))
    (kept,) = engine.cache_sizes()
    more = [451] * (64 - kept - 5)
    with pytest.raises(ContextFullError, match=f"after the conversation's {kept}"):
        ids(engine.generate(Request([*more, 451], max_new_tokens=4, keep_history=True)))
    assert engine.cache_sizes() == [kept]
    ids(engine.generate(Request(more, max_new_tokens=4, keep_history=True)))
    assert kept + len(more) <= engine.cache_sizes()[0] <= 64


@pytest.mark.parametrize("release", ["1.2.3", "1.3.0"])
@pytest.mark.parametrize("keep_history", [False, True])
def test_a_conversation_with_the_runtimes_own_template(
    release: str, keep_history: bool, load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the template adds to each prompt is counted, so the conversation loses nothing of its beginning."""
    monkeypatch.setenv("RKEMU_GUESS", "tokens-wrapped")
    engine = load(release, max_context=128)
    ids(engine.generate(Request(QUESTION, max_new_tokens=1, keep_history=keep_history)))
    assert [finding.code for finding in engine.findings] == ["token-input-wrapped"]
    (kept,) = engine.cache_sizes()
    with pytest.raises(ContextFullError, match="runtime's own template"):
        while True:
            (*_, finished) = engine.generate(Request([451] * 8, max_new_tokens=4, keep_history=True))
            before, (kept,) = kept, engine.cache_sizes()
            assert before + finished.perf.prefill_tokens < kept + 1 <= 128
            assert finished.perf.prefill_tokens > 8
    assert engine.cache_sizes() == [kept]
    assert kept + finished.perf.prefill_tokens + 4 >= 128  # and nothing is refused that has room


@pytest.mark.parametrize("release", ["1.2.3", "1.3.0"])
def test_a_template_is_not_emptied_where_that_would_erase_a_conversation(
    release: str, load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_GUESS", "tokens-wrapped")
    engine = load(release)
    ids(engine.generate(SHORT))
    assert [finding.code for finding in engine.findings] == ["token-input-wrapped"]
    turn = Request(QUESTION, max_new_tokens=4, keep_history=True)
    sizes = engine.cache_sizes()
    for _ in range(2):
        ids(engine.generate(turn))
        sizes += engine.cache_sizes()
    grown = [after - before for before, after in pairwise(sizes)]
    assert min(grown) > len(QUESTION) + 4  # with the template's own tokens
    engine.clear_cache()
    ids(engine.generate(turn))
    assert engine.cache_sizes()[0] < min(grown)
