"""Random sequences of API calls against each layout: typed errors only, the next load works, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tests.runtime.engine.misbehaviour import collected, delivered

from rkruntime.engine.engine import Engine, LoadOptions, Lora
from rkruntime.engine.generation import EmbeddingPrompt, Event, Finished, Request, TextPrompt, Token
from rkruntime.errors import RKEdgeError, WorkerError

PROMPT = (2, 106, 451, 364, 472, 474)
TOKENS = st.lists(st.integers(0, 1100), min_size=0, max_size=12) | st.just(list(PROMPT)) | st.just(list(PROMPT) * 20)
REQUESTS = st.builds(
    Request,
    tokens=TOKENS,
    max_new_tokens=st.sampled_from([-1, 0, 1, 2, 7]),
    stop_tokens=st.frozensets(st.integers(0, 1023), max_size=300),
    pause_tokens=st.frozensets(st.integers(0, 1023), max_size=300) | st.just(frozenset()),
    keep_history=st.booleans(),
    lora=st.sampled_from([None, None, "none"]),
    prompt=st.none()
    | st.builds(TextPrompt, st.text(max_size=20), st.sampled_from(["user", "tool"]), st.booleans())
    | st.just(EmbeddingPrompt(np.ones((3, 128), np.float32))),
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_context": st.sampled_from([32, 64, 512, 2048, -5]),
        "max_new_tokens": st.sampled_from([-1, 3]),
        "asynchronous": st.booleans(),
        "cpus": st.sampled_from([None, (0, 1, 2), (0,)]),
        "n_batch": st.sampled_from([1, 1, 1, 2]),
        "ignore_eos": st.booleans(),
        "base_domain_id": st.sampled_from([0, 3, 99]),
    },
)


def machine(options: Callable[..., LoadOptions], release: str) -> type[RuleBasedStateMachine]:
    """The machine for a release. A model whose state says so little can be called in any order."""

    class Calls(RuleBasedStateMachine):
        @initialize()
        def start(self) -> None:
            self.folder = Path(tempfile.mkdtemp(prefix="rkedge-sequences-"))
            self.engine: Engine | None = None
            self.events: Generator[Event, None, None] | None = None
            self.load({})

        @rule(changes=OPTIONS)
        def load(self, changes: dict[str, Any]) -> None:
            self.close()
            with suppress(RKEdgeError):
                self.engine = Engine.load(options(release, **changes))

        @rule(request=REQUESTS)
        def generate(self, request: Request) -> None:
            self.attempt(lambda engine: check(list(engine.generate(request))))

        @rule(request=REQUESTS, taken=st.integers(0, 3))
        def begin(self, request: Request, taken: int) -> None:
            def start(engine: Engine) -> None:
                self.events = engine.generate(request)
                for _ in range(taken):
                    next(self.events, None)

            self.attempt(start)

        @precondition(lambda self: self.events is not None)
        @rule(taken=st.integers(0, 5))
        def go_on(self, taken: int) -> None:
            def step(_: Engine) -> None:
                assert self.events is not None
                for _number in range(taken):
                    next(self.events, None)

            self.attempt(step)

        @rule()
        def end(self) -> None:
            events, self.events = self.events, None
            if events is not None:
                with suppress(RKEdgeError):
                    events.close()

        @rule(request=REQUESTS, seconds=st.sampled_from([0, 0.001, 0.01]), way=st.sampled_from([collected, delivered]))
        def in_a_loop(self, request: Request, seconds: float, way: Any) -> None:
            async def run(engine: Engine) -> None:
                task = asyncio.create_task(way(engine, request))
                await asyncio.sleep(seconds)
                task.cancel()
                with suppress(asyncio.CancelledError, RKEdgeError):
                    check(await task)

            self.attempt(lambda engine: asyncio.run(run(engine)))

        @rule(request=REQUESTS, seconds=st.sampled_from([0, 0.0005, 0.003]))
        def abort(self, request: Request, seconds: float) -> None:
            def run(engine: Engine) -> None:
                timer = threading.Timer(seconds, engine.abort)
                timer.start()
                try:
                    check(list(engine.generate(request)))
                finally:
                    timer.join()

            self.attempt(run)

        @rule(request=REQUESTS, mode=st.sampled_from(["logits", "hidden"]))
        def arrays(self, request: Request, mode: str) -> None:
            self.attempt(lambda engine: [None for _ in engine.generate_arrays(request, mode)])

        @rule(request=REQUESTS)
        def hidden_states(self, request: Request) -> None:
            self.attempt(lambda engine: engine.hidden_states(request))

        @rule(requests=st.lists(REQUESTS, min_size=1, max_size=3))
        def batch(self, requests: list[Request]) -> None:
            self.attempt(lambda engine: list(engine.generate_batch(requests)))

        @rule(ranges=st.none() | st.lists(st.tuples(st.integers(-2, 20), st.integers(-2, 20)), min_size=1, max_size=2))
        def clear_cache(self, ranges: list[tuple[int, int]] | None) -> None:
            self.attempt(lambda engine: engine.clear_cache(keep_system_prompt=bool(ranges), ranges=ranges))

        @rule()
        def sizes(self) -> None:
            self.attempt(lambda engine: engine.cache_sizes())
            self.attempt(lambda engine: engine.is_running())

        @rule(path=st.sampled_from(["saved", "none", "broken"]), save=st.booleans())
        def prompt_cache(self, path: str, save: bool) -> None:
            file = self.folder / path
            if path == "broken":
                file.write_bytes(b"\0" * 100)
            if save:
                request = Request(PROMPT, max_new_tokens=1, save_prompt_cache=file)
                self.attempt(lambda engine: list(engine.generate(request)))
            self.attempt(lambda engine: engine.load_prompt_cache(file))

        @rule()
        def release_prompt_cache(self) -> None:
            self.attempt(lambda engine: engine.release_prompt_cache())

        @rule(texts=st.lists(st.text(max_size=10), min_size=3, max_size=3))
        def texts(self, texts: list[str]) -> None:
            self.attempt(lambda engine: engine.set_chat_template(*texts))
            self.attempt(lambda engine: engine.set_function_tools(texts[0], [{"name": texts[1]}], texts[2]))

        @rule()
        def adapter(self) -> None:
            self.attempt(lambda engine: engine.load_lora(Lora("self", engine.options.model)))

        @precondition(lambda self: self.engine is not None)
        @rule()
        def kill(self) -> None:
            assert self.engine is not None
            process = self.engine._connection.worker.process
            process.kill()
            process.wait()  # which kills the worker below it: what follows depends on nobody's speed
            self.attempt(lambda engine: engine.is_running())

        @rule()
        def close(self) -> None:
            self.end()
            engine, self.engine = self.engine, None
            if engine is not None:
                engine.close()
                assert engine._connection.worker.ended

        def attempt(self, call: Callable[[Engine], Any]) -> None:
            """A call ends well or as an error of the tree; a worker that is gone stays gone."""
            if self.engine is None:
                return
            try:
                call(self.engine)
            except WorkerError:
                self.close()
            except RKEdgeError:
                return

        def teardown(self) -> None:
            if not hasattr(self, "folder"):
                return
            self.close()
            shutil.rmtree(self.folder)
            with Engine.load(options(release)) as engine:
                events = list(engine.generate(Request(PROMPT, max_new_tokens=5)))
                check(events)
                assert len(events) == 6

    return Calls


def check(events: list[Event]) -> None:
    """What every run gives: tokens, then how it ended, with their number."""
    *tokens, finished = events
    assert isinstance(finished, Finished)
    assert all(isinstance(token, Token) for token in tokens)
    assert finished.generated_tokens == len(tokens)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def run(options: Callable[..., LoadOptions], release: str, examples: int, steps: int) -> None:
    threads, descriptors, before = threading.active_count(), len(os.listdir("/proc/self/fd")), children()
    run_state_machine_as_test(
        machine(options, release),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert children() <= before


def test_random_sequences(options: Callable[..., LoadOptions], release: str) -> None:
    run(options, release, examples=8, steps=40)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_calls(options: Callable[..., LoadOptions], release: str) -> None:
    run(options, release, examples=100, steps=100)
