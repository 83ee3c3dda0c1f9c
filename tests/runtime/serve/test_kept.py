"""What there is of an answer is kept once, wherever its client leaves and whatever fails."""

from __future__ import annotations

import asyncio
import os
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import questions
from rkruntime.chat.remotechat import RemoteChat
from rkruntime.chat.repl import Note
from rkruntime.chat.ways import on_this_machine
from rkruntime.engine.generation import Event, Finished, FinishReason, Request
from rkruntime.errors import HostError, WorkerCrashedError
from rkruntime.serve.api.native import _Turn
from rkruntime.serve.host import Host
from rkruntime.serve.run import GenerationRequest, Outcome, Prompt, Run
from rkruntime.serve.service import Service
from rkruntime.serve.settings import Limits, PromptCache, Sessions, Settings
from rkruntime.serve.threads import on_disk
from rkruntime.testing import fake_model
from rkruntime.text.answer import Answer
from rkruntime.text.conversation import SCHEMA, read_conversation
from rkruntime.text.template import Message

from .streams import begin_stream

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"


@types.coroutine
def cancelled_at(work: Coroutine[Any, Any, None], steps: range, late: bool) -> Generator[Any, Any, int]:
    """Run `work` and cancel its task where it waits for these times, or when that for which it waits has just come.

    Returns how often it waited.
    """
    task = asyncio.current_task()
    assert task is not None
    waits, inner = 0, work.__await__()
    step: Callable[[], Any] = lambda: inner.send(None)  # noqa: E731 - changes with what comes
    while True:
        try:
            waited = step()
        except StopIteration:
            return waits
        if waits in steps:
            if late and waited is not None:
                waited.add_done_callback(lambda _: task.cancel())
            else:
                task.cancel()
        waits += 1
        try:
            value = yield waited
            step = lambda value=value: inner.send(value)  # type: ignore[misc]  # noqa: E731
        except BaseException as error:
            step = lambda error=error: inner.throw(error)  # type: ignore[misc]  # noqa: E731


CASES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "to its end": ("Yes, it is.", "Yes, it is.", ()),
    "to a stop string": ("Yes, it is.", "Yes, ", ("it",)),
    "with a worker that dies": ([*b"Yes, ", WorkerCrashedError("gone"), *b"it is."], "Yes, ", ()),
    "with a worker that dies at the start": ([WorkerCrashedError("gone")], "", ()),
    "with nothing in it": ("", "", ()),
}


def one_run(
    tmp_path: Path, case: str, steps: range, *, late: bool = False, full: bool = False, limits: Limits | None = None
) -> tuple[int, Run, list[tuple[Answer, bool]], bool]:
    """How often the run waited, the run, what was kept, and whether all of the answer had come."""
    script, _, stop = CASES[case]
    model, given, kept = fake_model(script), list[Event](), list[tuple[Answer, bool]]()
    engine: Any = model.engine

    async def agenerate(request: Request) -> AsyncGenerator[Event, None]:
        try:
            for event in engine.generate(request):
                await asyncio.sleep(0)
                given.append(event)
                yield event
        finally:
            await asyncio.sleep(0)

    engine.agenerate = agenerate

    async def keep(answer: Answer, whole: bool) -> None:
        await on_disk(kept.append, (answer, whole))
        if full:
            raise HostError("The disk is full.")

    def prompt(model: Any) -> Prompt:
        return Prompt(model.prompts.prompt([Message("user", "Is it?")], 4096)[0])

    async def main() -> tuple[int, Run]:
        settings = replace(
            Settings(),
            sessions=Sessions(tmp_path / "s"),
            prompt_cache=PromptCache(tmp_path / "c"),
            limits=limits or Limits(),
        )
        service = Service(settings, Host(settings, lambda *_: model))
        waits = 0

        async def work(run: Run) -> None:
            nonlocal waits
            waits = await cancelled_at(
                service._run(GenerationRequest(prompt, ("ann", "", ""), "1", stop=stop, save=keep), run), steps, late
            )

        run = Run(work)
        await asyncio.wait({run._task})
        assert not service.queue.busy
        await service.host.close()
        return waits, run

    waits, run = asyncio.run(main())
    text = bytes(event.token_id for event in given if not isinstance(event, Finished)).decode()
    ended = any(isinstance(event, Finished) for event in given) or any(one in text for one in stop)
    return waits, run, kept, ended


@pytest.mark.parametrize("full", [False, True], ids=["", "full disk"])
@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_kept_once_wherever_it_is_cancelled(tmp_path: Path, case: str, full: bool) -> None:
    expected = CASES[case][1]
    waits = one_run(tmp_path, case, range(0))[0]
    assert waits > 3
    for at in range(-1, waits):
        for late in (False, True):
            for steps in (range(at, at + 1), range(max(at, 0), waits + 9)):
                _, run, kept, ended = one_run(tmp_path, case, steps, late=late, full=full)
                assert len(kept) == (run.reader is not None), (at, late)
                if not kept:
                    assert not run._items
                    continue
                ((answer, whole),) = kept
                assert whole == ended, (at, late)
                assert answer.text == expected if whole else "Yes, it is.".startswith(answer.text)
                told = "".join(item for item in run._items if isinstance(item, str))
                assert answer.text.startswith(told)
                assert whole or not any(isinstance(item, Outcome) for item in run._items)


def test_an_answer_that_takes_too_long_is_kept_as_far_as_it_came(tmp_path: Path) -> None:
    """The limit comes at any time: where the run waits for an event is as good as any other."""
    for limit in (0.0, 0.0005, 0.001, 0.002):
        _, run, kept, ended = one_run(tmp_path, "to its end", range(0), limits=replace(Limits(), request_s=limit))
        assert len(kept) == (run.reader is not None)
        assert all(whole == ended for _, whole in kept)


def test_a_turn_that_fails_forgets_none(tmp_path: Path) -> None:
    """The context is full, and the oldest turns are left out: for good where there is an answer, and only there."""
    model = fake_model("", max_context=120)
    old = [{"role": role, "content": role * 3} for role in ("user", "assistant") * 5]
    turn = _Turn({"schema": SCHEMA, "system": "", "messages": old}, "Why?", "n", {}, drop=True)
    assert turn.prompt(model).notes
    nothing = Answer("", (), FinishReason.ABORT, 9)
    assert turn.kept(nothing, False) is None
    part = turn.kept(Answer("Be", (*b"Be",), FinishReason.ABORT, 9), False)
    assert part
    assert part["messages"] == old
    again = _Turn(part, "Why?", "n", {}, part["broken"]["drop"], (*b"Be",), made_by=turn.made_by)
    assert again.prompt(model).begun == (*b"Be",)
    kept = again.kept(Answer("Because.", (*b"Because.",), FinishReason.STOP, 9, begun=2), True)
    assert kept
    assert [item["content"] for item in kept["messages"]][-2:] == ["Why?", "Because."]
    assert len(kept["messages"]) < len(old)


# With a daemon


@pytest.fixture(scope="module")
def slow(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("temperature: 0", port=False, RKEMU_TOKEN_US="30000")


@pytest.fixture
def chat(slow: Any) -> Any:
    way = on_this_machine(slow.socket, "its log")
    one = RemoteChat(way, session="talk", system="", options={"temperature": 0})
    yield one
    one.close()
    slow.request("DELETE", "/sessions/talk")


def stopped_after(chat: RemoteChat, question: str, number: int) -> str:
    """What a person sees of an answer that they stop after so many pieces."""
    seen: list[str | Note] = []
    for piece in chat.ask(question):
        seen.append(piece)
        if len(seen) == number:
            chat.stop()
    chat.stop()  # Ctrl-C came too late
    assert all(isinstance(piece, str) for piece in seen), seen
    return "".join(map(str, seen))


def test_a_stopped_turn_is_saved_as_it_was_seen_and_goes_on_from_there(
    chat: RemoteChat, slow: Any, tmp_path: Path
) -> None:
    seen = stopped_after(chat, FIRST, 2)
    assert QA[FIRST].startswith(seen)
    assert 0 < len(seen) < len(QA[FIRST])
    chat.save(tmp_path / "talk.json")
    saved = read_conversation(tmp_path / "talk.json")
    assert [item["content"] for item in saved["messages"]] == [FIRST, seen]
    assert [item["content"] for item in slow.request("GET", "/sessions/talk")[2]["messages"]] == [FIRST, seen]
    # What is sent next counts it, as transformers does.
    messages = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": seen}]
    body = {"messages": [*messages, {"role": "user", "content": "Why?"}], "max_tokens": 1}
    expected = slow.request("POST", "/v1/chat/completions", body)[2]["usage"]["prompt_tokens"]
    done = slow.lines("/sessions/talk/messages", {"content": "Why?", "max_tokens": 1})[-1]
    assert done["prompt_tokens"] == expected
    # And a file that was loaded begins where it was saved.
    chat.clear()
    chat.load(tmp_path / "talk.json")
    done = slow.lines("/sessions/talk/messages", {"content": "Why?", "max_tokens": 1})[-1]
    assert done["prompt_tokens"] == expected


def test_stopping_before_anything_came(chat: RemoteChat, slow: Any, tmp_path: Path) -> None:
    pieces = chat.ask(FIRST)
    chat.stop()  # nothing is asked yet
    seen = ""
    for piece in pieces:
        seen += piece if isinstance(piece, str) else ""  # a note, if the board is slow to say what it kept
        chat.stop()
    chat.save(tmp_path / "talk.json")
    contents = [item["content"] for item in read_conversation(tmp_path / "talk.json")["messages"]]
    assert contents == ([FIRST, seen] if seen else [])
    assert [item["name"] for item in slow.request("GET", "/sessions")[2]["sessions"]] == ["talk"] * bool(seen)


def test_a_chat_whose_reader_goes_away_goes_on(chat: RemoteChat) -> None:
    pieces = chat.ask(FIRST)
    seen = next(pieces)
    pieces.close()
    turns = chat._read()["messages"]
    assert turns[1]["content"].startswith(seen)
    assert len(turns[1]["content"]) < len(QA[FIRST])


def test_who_asks_at_once_after_leaving_finds_what_was_kept(slow: Any) -> None:
    """The daemon may not have seen yet that the first one is gone."""
    for number in range(5):
        one, _ = begin_stream(slow, f"/sessions/n{number}/messages", {"content": FIRST}, b'{"type":"text"')
        one.close()
        slow.lines(f"/sessions/n{number}/messages", {"content": "Why?", "max_tokens": 1})
        turns = slow.request("GET", f"/sessions/n{number}")[2]["messages"]
        assert [turns[0]["content"], turns[2]["content"]] == [FIRST, "Why?"]


def test_commands_reconnect_after_a_stop(chat: RemoteChat) -> None:
    stopped_after(chat, FIRST, 2)
    assert chat._link is not None
    chat._link._process.kill()
    assert chat.stats()["session"] == "talk"
    chat._link._process.kill()
    chat.set_system("Be kind.")
    assert "".join(map(str, chat.ask(FIRST)))


def test_a_broken_connection_after_a_stop_is_told(chat: RemoteChat) -> None:
    seen: list[str | Note] = []
    for piece in chat.ask(FIRST):
        seen.append(piece)
        if len(seen) == 2:
            assert chat._link is not None
            os.kill(chat._link._process.pid, 9)
            chat.stop()
    assert isinstance(seen[-1], Note)
    assert "kept" in seen[-1].text
    assert chat.stats()
