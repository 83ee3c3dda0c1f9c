"""Remembered answers: the ids come back with the same conversation of the same user, and say nothing but its text."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkconvert.demo import checkpoint, questions
from rkruntime.errors import WorkerCrashedError
from rkruntime.serve.api.generate import WholeChat
from rkruntime.serve.host import Host
from rkruntime.serve.memory import AnswerMemory
from rkruntime.serve.run import GenerationRequest
from rkruntime.serve.service import Service
from rkruntime.serve.settings import PromptCache, Sessions, Settings
from rkruntime.serve.users import User
from rkruntime.testing import fake_model
from rkruntime.text.template import Message
from rkruntime.text.vocabulary import Vocabulary

ANN, BOB = User("ann"), User("bob")
# Bytes that an answer counts for, beside its ids.
ENTRY = 1024
# Bytes and, behind them, a control token and an id that stands for nothing.
BYTES = Vocabulary([bytes([value]) for value in range(256)] + [b"", b""], {"<end_of_turn>": 256})


def ask(*texts: str) -> list[Message]:
    return [Message("assistant" if at % 2 else "user", text) for at, text in enumerate(texts)]


def test_ids_come_back_with_the_conversation() -> None:
    memory = AnswerMemory(BYTES)
    memory.remember(ANN, ask("a"), " b ", b" b ")
    memory.remember(ANN, ask("a", " b ", "c"), "d", b"d")
    recalled = memory.recall(ANN, ask("a", " b ", "c", "d", "e"))
    assert [message.tokens for message in recalled] == [None, (*b" b ",), None, (*b"d",), None]
    assert [message.content for message in recalled] == ["a", " b ", "c", "d", "e"]
    # What a client trimmed is not there.
    trimmed = memory.recall(ANN, ask("a", " b", "c", "d", "e"))
    assert [message.tokens for message in trimmed] == [None, (*b" b",), None, (*b"d",), None]
    # Another beginning, another answer, another role, another user: nothing.
    for other in (ask("x", " b ", "c", "d"), ask("a", "B", "c", "d"), ask("", " b "), [Message("user", " b ")]):
        assert all(message.tokens is None for message in memory.recall(ANN, other))
    assert all(message.tokens is None for message in memory.recall(BOB, ask("a", " b ", "c", "d")))


def test_contents_cannot_be_shifted_between_messages() -> None:
    memory = AnswerMemory(BYTES)
    memory.remember(ANN, ask("ab"), "c", b"c")
    assert memory.recall(ANN, ask("a", "bc"))[1].tokens is None
    assert memory.recall(ANN, [Message("user", "a"), Message("user", "b"), Message("assistant", "c")])[2].tokens is None


@given(
    ids=st.lists(st.sampled_from([*b" aA\n", 0xC3, 0xA9, 256, 257, 258, 1 << 20]), max_size=8),
    cut=st.integers(0, 8),
    text=st.none() | st.text(alphabet=" aé\ufffd", max_size=4),
)
def test_ids_say_the_text_and_nothing_else(ids: list[int], cut: int, text: str | None) -> None:
    said = BYTES.decode(ids)[:cut] if text is None else text
    memory = AnswerMemory(BYTES)
    memory.remember(ANN, ask("q"), said, ids)
    known = memory.recall(ANN, ask("q", said))[1].tokens
    assert known is None or (list(known) == ids[: len(known)] and bytes(known) == said.encode())
    if all(one < 256 for one in ids) and said and bytes(ids).startswith(said.encode()):
        assert known is not None


@given(
    asked=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.integers(1, 12)), max_size=30),
)
def test_no_more_is_kept_than_said_and_a_small_user_keeps_what_is_theirs(asked: list[tuple[str, int, int]]) -> None:
    memory = AnswerMemory(BYTES, capacity=24 * 4 + 3 * ENTRY)
    memory.remember(BOB, ask("mine"), "12345678", b"12345678")
    for name, question, size in asked:
        memory.remember(User(name), ask(f"question {question}"), "x" * size, b"x" * size)
        kept = {
            user: sum(ENTRY + 4 * len(ids) for ids in answers._ids.values()) for user, answers in memory._kept.items()
        }
        assert kept == {user: answers.size for user, answers in memory._kept.items()}
        assert sum(kept.values()) <= 24 * 4 + 3 * ENTRY
    if {name for name, _, _ in asked} <= {"a"}:
        assert memory.recall(BOB, ask("mine", "12345678"))[1].tokens == (*b"12345678",)


@pytest.mark.parametrize("users", [1, 10_000])
def test_many_short_answers_take_no_more_memory_than_they_may(users: int) -> None:
    capacity = 1 << 20
    tracemalloc.start()
    try:
        memory = AnswerMemory(BYTES, capacity=capacity)
        for number in range(10_000):
            memory.remember(User(f"user {number % users}"), ask(f"question {number}"), "x", b"x")
        assert tracemalloc.get_traced_memory()[0] < capacity + 100_000
    finally:
        tracemalloc.stop()
    last = 10_000 - 1
    assert memory.recall(User(f"user {last % users}"), ask(f"question {last}", "x"))[1].tokens == (*b"x",)


QA = {row.question: row.answer for row in questions()}
FOLLOW = ("Why?", "Tell me more", "And the memory?", "yes")


def chat(daemon: Any, name: str, *texts: str, **options: Any) -> tuple[str, int]:
    messages = [{"role": item.role, "content": item.content} for item in ask(*texts)]
    body = {"messages": messages, "temperature": 0, "max_tokens": 40, **options}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body, {"X-RKEdge-User": name})
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def transformers_tokens(*texts: str) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint()))
    messages = [{"role": item.role, "content": item.content} for item in ask(*texts)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_nobody_changes_the_answers_of_others(start_daemon: Callable[..., Any], path: str) -> None:
    """Ann has answers cut by stop strings; Bob sends the same texts. The demo's tokenizer, by transformers, counts."""
    daemon = start_daemon("temperature: 0", port=False)
    talks = [(question, answer.split()[0], more) for question, answer in [*QA.items()][:4] for more in FOLLOW]
    before = {talk: chat(daemon, "bob", *talk) for talk in talks}
    assert before[talks[0]][1] == transformers_tokens(*talks[0])
    for question, first, _ in talks[:: len(FOLLOW)]:
        stop = {"stop": [QA[question][len(first) :]]}
        body = {
            "model": "x",
            "messages": [{"role": "user", "content": question}],
            "stream": False,
            **stop,
            "options": stop,
        }
        status, _, answer = daemon.request("POST", path, body, {"X-RKEdge-User": "ann"})
        assert status == 200
        assert first in (answer.get("message") or answer["choices"][0]["message"])["content"]
        # What was cut is not there for Ann either.
        assert chat(daemon, "ann", question, first, "Why?")[1] <= transformers_tokens(question, first, "Why?") + len(
            first
        )
    assert {talk: chat(daemon, "bob", *talk) for talk in talks} == before


@pytest.mark.parametrize("how", ["unload", "lost"])
def test_no_answer_outlives_its_model(tmp_path: Path, how: str) -> None:
    """The bundle may be another one by the time when the model is needed again."""
    models = [fake_model("Yes.", "No."), fake_model("Maybe.")]
    seen: list[list[Any]] = []
    for model in models:

        def prompt(messages: Any, *args: Any, make: Any = model.prompts.prompt, **options: Any) -> Any:
            seen.append([message.tokens for message in messages])
            return make(messages, *args, **options)

        model.prompts.prompt = prompt  # type: ignore[method-assign]
    folders = {"sessions": Sessions(tmp_path / "s"), "prompt_cache": PromptCache(tmp_path / "c")}
    settings = replace(Settings(), **folders)  # type: ignore[arg-type]

    async def main() -> None:
        service = Service(settings, Host(settings, lambda *_: models.pop(0)))
        request: Any = SimpleNamespace(scope={"rkedge.user": ANN})
        for texts in (["Is it?"], ["Is it?", "Yes.", "Why?"], ["Is it?", "Yes.", "Why?"]):
            talk = WholeChat(request, service, ask(*texts))
            run = service.start(GenerationRequest(talk.prompt, ("ann", "", ""), "1", save=talk.save))
            while await run.take():
                pass
            if len(seen) == 2:
                if how == "unload":
                    await service.host.unload()
                else:
                    await service.host.lost(WorkerCrashedError("gone"))

    asyncio.run(main())
    assert seen == [[None], [None, (*b"Yes.",), None], [None, None, None]]
