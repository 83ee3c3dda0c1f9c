"""A worker that lies on its pipe: the parent comes back in time, with a typed error or with what was truly said.

A library in the worker can write to the pipe of the records: its number stands in the command line.
"""

from __future__ import annotations

import asyncio
import json
import resource
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.runtime.engine.misbehaviour import collected, delivered

from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Finished, Request, Token
from rkruntime.engine.worker.exchange import Exchange
from rkruntime.errors import (
    LibraryError,
    RKEdgeError,
    RunError,
    WorkerCrashedError,
    WorkerError,
    WorkerHungError,
    WorkerProtocolError,
)

FAKE = str(Path(__file__).with_name("fake_worker.py"))
REQUEST = Request([1, 2, 3], max_new_tokens=8)
TOKEN, LOGITS, HIDDEN, FINISHED, REPLY, ERROR, TOKENIZE, EMBED = range(8)
Fake = Callable[..., Engine]


def record(
    kind: int,
    data: bytes | Any = b"",
    *,
    value: int = 0,
    batch: int = 0,
    run: int | None = None,
    size: int | None = None,
) -> str:
    """A record as hex digits; without a run it belongs to the command that is answered."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    head = struct.pack("<BB", kind, batch).hex()
    number = "NNNN" if run is None else struct.pack("<H", run & 0xFFFF).hex()
    return head + number + struct.pack("<iI", value, len(data) if size is None else size).hex() + data.hex()


def end(reason: str = "stop", generated: int = 2, **changes: Any) -> str:
    return record(FINISHED, {"reason": reason, "prompt_tokens": 3, "generated": generated, "perf": None, **changes})


LOADED = [record(REPLY, 512)]
ENDLESS = [record(REPLY, 0)]  # a context that is not known limits nothing
HONEST = [record(TOKEN, b"a", value=7), record(TOKEN, b"b", value=8), end()]
SAID = [Token(7, b"a"), Token(8, b"b")]


@pytest.fixture
def fake(double: Callable[..., Path], tmp_path: Path) -> Fake:
    """An engine over a worker that answers its commands, after the load, with these steps."""

    def load(*answers: Sequence[str], loaded: Sequence[str] = LOADED, **changes: Any) -> Engine:
        script, model = tmp_path / "script.json", tmp_path / "model.rkllm"
        script.write_text(json.dumps([loaded, *answers]))
        model.write_bytes(b"not read")
        limits = {"load_timeout": 5.0, "token_timeout": 1.0, "close_timeout": 0.5}
        return Engine.load(
            LoadOptions(
                library=double("1.3.0"),
                model=model,
                interpreter=(sys.executable, "-I", "-S", FAKE),
                environment={"FAKE_WORKER": str(script)},
                **(limits | changes),
            )
        )

    return load


def test_the_fake_can_be_honest(fake: Fake) -> None:
    with fake(HONEST, HONEST) as engine:
        for _ in range(2):
            *tokens, finished = engine.generate(REQUEST)
            assert tokens == SAID
            assert isinstance(finished, Finished)


LIES: dict[str, list[str]] = {
    "unknown kind": [record(8)],
    "kind 255": [record(255, batch=255)],
    "a reply to a run": [record(REPLY, 1)],
    "an array in a run of tokens": [record(LOGITS, bytes(8), value=2)],
    "hidden states in a run of tokens": [record(HIDDEN, bytes(8), value=2)],
    "a question that nobody can answer": [record(TOKENIZE, b"text")],
    "ids that nobody can embed": [record(EMBED, bytes(8))],
    "a batch that there is not": [record(TOKEN, b"a", batch=1)],
    "a run of the future": [record(TOKEN, b"a", run=9)],
    "an old array": [record(LOGITS, bytes(8), value=2, run=1)],
    "4 GB": [record(TOKEN, size=0xFFFFFFFF), "repeat", "61" * 4096],
    "a token of 1 GB": [record(TOKEN, size=1 << 30), "repeat", "61" * 4096],
    "an error of 1 GB": [record(ERROR, size=1 << 30), "repeat", "61" * 4096],
    "a negative token": [record(TOKEN, b"a", value=-5)],
    "tokens without end": ["repeat", record(TOKEN, b"a", value=7)],
    "no JSON": [record(FINISHED, b"{")],
    "nothing": [record(FINISHED, b"")],
    "not UTF-8": [record(FINISHED, b"\xff\xff")],
    "nested without end": [record(ERROR, b"[" * 100_000)],
    "digits without end": [record(FINISHED, b"9" * 60_000)],
    "a list": [record(FINISHED, [])],
    "no reason": [record(FINISHED, {})],
    "an unknown reason": [end("because")],
    "a reason that is a list": [end([])],  # type: ignore[arg-type]
    "a negative count": [end(generated=-1)],
    "a count as text": [end(generated="2")],  # type: ignore[arg-type]
    "a count too large": [end(generated=10**30)],
    "a true count": [end(prompt_tokens=True)],
    "half of the figures": [end(perf={"prefill_ms": 1.0})],
    "figures as text": [end(perf="fast")],
    "the end of another prompt": [record(FINISHED, {"reason": "stop"}, batch=1)],
    "an error of no class": [record(ERROR, {"error": "Any", "message": "", "hint": "", "details": {}})],
    "an error of builtins": [record(ERROR, {"error": "__builtins__", "message": "", "hint": "", "details": {}})],
    "an error of the worker's": [record(ERROR, {"error": "WorkerHungError", "message": "", "hint": ""})],
    "an error that is a list": [record(ERROR, {"error": [], "message": "", "hint": "", "details": {}})],
    "an error without words": [record(ERROR, {"error": "RunError", "message": 3, "hint": "", "details": {}})],
    "an error that is a number": [record(ERROR, 3)],
}


@pytest.mark.parametrize(
    ("lie", "in_loop"),
    [(lie, None) for lie in LIES]
    + [(lie, collected) for lie in ("unknown kind", "4 GB", "tokens without end", "no JSON", "an error of no class")]
    + [(lie, delivered) for lie in LIES],
)
def test_a_lie_ends_the_worker(fake: Fake, lie: str, in_loop: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with fake([HONEST[0], *LIES[lie], *HONEST], HONEST) as engine:
        with pytest.raises(WorkerProtocolError, match="The worker sent"):
            asyncio.run(in_loop(engine)) if in_loop else list(engine.generate(REQUEST))
        assert not engine.alive
        with pytest.raises(WorkerProtocolError, match="The worker is gone"):
            list(engine.generate(REQUEST))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize(
    "loaded", [[record(REPLY, -1)], [record(REPLY, "512")], [record(REPLY, b"{")], [HONEST[0]], HONEST]
)
def test_a_lie_about_the_load(fake: Fake, loaded: list[str]) -> None:
    with pytest.raises(WorkerProtocolError):
        fake(loaded=loaded)


@pytest.mark.parametrize(("mode", "kind"), [("logits", LOGITS), ("hidden", HIDDEN)])
def test_arrays_have_the_expected_size(fake: Fake, mode: str, kind: int) -> None:
    good = record(kind, bytes(4 * 4 * 3), value=4)
    with fake([good, end(generated=0)]) as engine:
        array, _ = engine.generate_arrays(REQUEST, mode)
        assert array.values.shape == (3, 4)
    wrong = {
        "a row more than the context has": record(kind, bytes(513 * 4 * 4), value=4),
        "half a row": record(kind, bytes(4 * 3), value=2),
        "no columns": record(kind, bytes(4), value=0),
        "negative columns": record(kind, bytes(4), value=-1),
        "a size without data": record(kind, value=1 << 18, size=1 << 31),
        "the other kind": record(LOGITS + HIDDEN - kind, bytes(4), value=1),
    }
    for text in wrong.values():
        with fake([text, end()]) as engine, pytest.raises(WorkerProtocolError):
            list(engine.generate_arrays(REQUEST, mode))


def test_late_records_are_dropped(fake: Fake) -> None:
    """Of a library that calls back when its run is over; they belong to nobody."""
    late = [*HONEST, record(TOKEN, b"late", value=9), end("length")]
    with fake(late, HONEST, late, [record(REPLY, [5])], HONEST) as engine:
        for _ in range(2):
            assert list(engine.generate(REQUEST))[:-1] == SAID
        list(engine.generate(REQUEST))
        assert engine.cache_sizes() == [5]
        assert asyncio.run(collected(engine))[:-1] == SAID
    with fake(late, late, HONEST) as engine:
        for _ in range(3):
            assert asyncio.run(delivered(engine))[:-1] == SAID


def test_late_records_are_no_sign_of_life(fake: Fake) -> None:
    with fake(["repeat", record(TOKEN, b"late", run=1)]) as engine, pytest.raises(WorkerHungError):
        list(engine.generate(REQUEST))
    with fake(["repeat", record(TOKEN, b"late", run=1)]) as engine, pytest.raises(WorkerHungError):
        asyncio.run(collected(engine))
    with fake(["repeat", record(TOKEN, b"late", run=1)]) as engine, pytest.raises(WorkerHungError):
        asyncio.run(delivered(engine))


def test_questions_are_no_sign_of_life(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkruntime.engine.worker.process._COMMAND_TIMEOUT", 0.5)  # nor does the fake read the answers
    options = {"tokenizer": lambda text: [1], "load_timeout": 1.0}
    with pytest.raises(WorkerHungError):
        fake(loaded=["repeat", record(TOKENIZE, b"text")], **options)


def test_an_end_that_is_broken_does_not_leak(fake: Fake) -> None:
    """The rest of a run was the next one's answer."""
    with fake([HONEST[0], record(FINISHED, b"{"), *HONEST[1:]], HONEST) as engine:
        with pytest.raises(WorkerProtocolError):
            list(engine.generate(REQUEST))
        with pytest.raises(WorkerProtocolError):
            list(engine.generate(REQUEST))


@pytest.mark.parametrize("loop", [None, collected, delivered])
def test_a_child_that_goes_on_when_the_worker_is_gone(fake: Fake, loop: Any) -> None:
    request = Request([1])  # any number of tokens
    script = ["fork", record(TOKEN, b"a", value=7)]
    with fake(script, loaded=ENDLESS) as engine, pytest.raises(WorkerCrashedError, match="exit code 3"):
        asyncio.run(loop(engine, request)) if loop else list(engine.generate(request))


@pytest.mark.parametrize("loop", [False, True])
def test_an_abort_that_is_not_heard_has_an_end(fake: Fake, loop: bool) -> None:
    async def go(engine: Engine) -> None:
        events = engine.agenerate(Request([1]))
        await anext(events)
        await events.aclose()

    with fake(["repeat", record(TOKEN, b"a", value=7)], loaded=ENDLESS) as engine:
        if loop:
            with pytest.raises(WorkerHungError):
                asyncio.run(go(engine))
        else:
            with closing(engine.generate(Request([1]))) as events:
                next(events)
        assert not engine.alive


def test_a_worker_that_reads_no_commands(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkruntime.engine.worker.process._COMMAND_TIMEOUT", 0.5)
    with fake(["wait"], max_context=None) as engine:
        events = engine.generate(Request([1]))
        with pytest.raises(WorkerHungError):
            next(events)
    with fake(loaded=[record(REPLY, 1 << 30), "wait"]) as engine, pytest.raises(WorkerHungError):
        list(engine.generate(Request([1] * 3_000_000)))


def test_errors_that_a_worker_may_send(fake: Fake) -> None:
    for kind in (RunError, LibraryError):
        plain = {"error": kind.__name__, "message": "so", "hint": "do", "details": {"log": 3, "description": [1]}}
        with fake([record(ERROR, plain)], HONEST) as engine:
            with pytest.raises(kind, match=r"^so$"):
                list(engine.generate(REQUEST))
            assert list(engine.generate(REQUEST))[:-1] == SAID  # it stays loaded


# --- random lies -------------------------------------------------------------------------------------------------

VALUES = st.sampled_from([0, 1, 4, -1, 7, 1 << 20, (1 << 31) - 1, -(1 << 31)]) | st.integers(-(1 << 31), (1 << 31) - 1)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ENDS = st.fixed_dictionaries(
    {
        "reason": st.sampled_from(["stop", "length", "abort", "pause"]) | JSONS,
        "prompt_tokens": st.integers(0, 9) | JSONS,
        "generated": st.integers(0, 9) | JSONS,
        "perf": st.none() | JSONS,
    }
)
FAILURES = st.fixed_dictionaries(
    {
        "error": st.sampled_from(["RunError", "Mapping", "annotations"]) | JSONS,
        "message": st.text() | JSONS,
        "hint": st.text() | JSONS,
    }
)
DATA = st.binary(max_size=40) | JSONS | ENDS | FAILURES
RECORDS = st.builds(
    record,
    st.integers(0, 9),
    DATA,
    value=VALUES,
    batch=st.sampled_from([0, 0, 0, 1, 255]),
    run=st.none() | st.none() | st.integers(0, 5),
    size=st.none() | st.none() | st.none() | st.sampled_from([0, 1, 1 << 16, 1 << 20, 0xFFFFFFFF]),
)
NOISE = st.binary(min_size=1, max_size=40).map(bytes.hex)
ANSWERS = st.lists(st.sampled_from(HONEST) | RECORDS | NOISE, max_size=6).flatmap(
    lambda steps: st.sampled_from([[], ["exit"], HONEST]).map(lambda tail: [*steps, *tail])
)


def mutated(steps: Sequence[str], at: int, flip: int) -> list[str]:
    """One bit of an answer changed; the number of the run is left as it is."""
    text = "".join(steps).replace("NNNN", "0200")
    data = bytearray.fromhex(text)
    data[at % len(data)] ^= 1 << flip
    return [bytes(data).hex()]


MUTATED = st.builds(mutated, st.just(HONEST), st.integers(0, 300), st.integers(0, 7))


def told(engine: Engine, loop: bool) -> list[Any]:
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return asyncio.run(collected(engine)) if loop else list(engine.generate(REQUEST))
    except RKEdgeError as error:
        assert isinstance(error, (RunError, WorkerError, LibraryError)) or type(error).__name__ in {
            "UsageError",
            "LoadError",
        }
        return []
    finally:
        assert time.monotonic() - began < 20  # token_timeout is 0.2; the rest is for a busy machine
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # kB


def check_random_lies(fake: Fake, examples: int) -> None:
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(first=ANSWERS | MUTATED, loop=st.booleans())
    def lies(first: list[str], loop: bool) -> None:
        # The second answer is marked: what the first one left behind must not stand in it.
        marked = [record(TOKEN, b"m", value=77), end(generated=1)]
        with fake(first, marked, token_timeout=0.2) as engine:
            told(engine, loop)
            if engine.alive:
                events = told(engine, loop)
                assert [event for event in events if isinstance(event, Token)] in ([], [Token(77, b"m")])
                assert engine.alive is bool(events)

    lies()


def test_random_lies(fake: Fake) -> None:
    check_random_lies(fake, 40)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_random_lies(fake: Fake) -> None:
    check_random_lies(fake, 3000)


@given(
    heads=st.lists(
        st.tuples(
            st.integers(0, 255), st.integers(0, 255), st.integers(0, 65535), VALUES, st.integers(0, (1 << 32) - 1)
        ),
        max_size=20,
    )
)
def test_no_head_does_more_than_be_refused(heads: list[tuple[int, int, int, int, int]]) -> None:
    exchange = Exchange(3, "logits", [TOKENIZE], batches=2, most_tokens=4, most_rows=3)
    for head in heads:
        try:
            assert exchange.accepts(*head) in (True, False)
        except WorkerProtocolError:
            continue
        assert head[4] <= 1 << 24 or (head[0] == LOGITS and head[4] <= 4 * 3 << 20)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("read", [collected, delivered])
@pytest.mark.parametrize(
    ("steps", "error"),
    [(HONEST[:1], WorkerHungError), (LIES["a negative token"], WorkerProtocolError)],
    ids=["hangs", "lies"],
)
def test_a_worker_that_is_slow_to_die_does_not_hold_up_the_event_loop(
    fake: Fake,
    steps: list[str],
    error: type[WorkerError],
    read: Callable[[Engine], Any],
    cancelled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that hangs in the NPU's driver: here it dies once the loop has had a turn. A cancel hides no loss."""
    engine = fake(steps, token_timeout=0.3)
    dying, dies, held_up = threading.Event(), threading.Event(), False
    process = engine._connection.worker.process
    terminate = process.terminate

    def slowly() -> None:
        nonlocal held_up
        dying.set()
        held_up = not dies.wait(5)
        terminate()

    async def main() -> None:
        task = asyncio.ensure_future(read(engine))
        while not dying.is_set():
            await asyncio.sleep(0.01)
        if cancelled:
            task.cancel()
            await asyncio.sleep(0.01)
        dies.set()
        await task

    monkeypatch.setattr(process, "terminate", slowly)
    with pytest.raises(error):
        asyncio.run(main())
    assert not held_up
    with pytest.raises(error, match="The worker is gone"):
        list(engine.generate(Request([1])))
    engine.close()
