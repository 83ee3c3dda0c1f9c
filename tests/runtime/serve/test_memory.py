"""Remembered answers: the ids come back with the same conversation, and with no other."""

from hypothesis import given
from hypothesis import strategies as st

from rkruntime.serve.memory import AnswerMemory
from rkruntime.text.template import Message


def ask(*texts: str) -> list[Message]:
    return [Message("assistant" if at % 2 else "user", text) for at, text in enumerate(texts)]


def test_ids_come_back_with_the_conversation() -> None:
    memory = AnswerMemory()
    memory.remember(ask("a"), " b ", [1, 2])
    memory.remember(ask("a", " b ", "c"), "d", [3])
    recalled = memory.recall(ask("a", "b", "c", "d", "e"))
    assert [message.tokens for message in recalled] == [None, (1, 2), None, (3,), None]
    assert [message.content for message in recalled] == ["a", "b", "c", "d", "e"]
    # Another beginning, another answer, another role: nothing.
    for other in (ask("x", "b", "c", "d"), ask("a", "B", "c", "d"), ask("", "b"), [Message("user", "b")]):
        assert all(message.tokens is None for message in memory.recall(other))
    memory.clear()
    assert all(message.tokens is None for message in memory.recall(ask("a", "b")))


def test_contents_cannot_be_shifted_between_messages() -> None:
    memory = AnswerMemory()
    memory.remember(ask("ab"), "c", [1])
    assert memory.recall(ask("a", "bc"))[1].tokens is None
    assert memory.recall([Message("user", "a"), Message("user", "b"), Message("assistant", "c")])[2].tokens is None


@given(sizes=st.lists(st.integers(0, 12), max_size=30))
def test_no_more_is_kept_than_said(sizes: list[int]) -> None:
    memory = AnswerMemory(capacity=20)
    for number, size in enumerate(sizes):
        memory.remember(ask(f"question {number % 7}"), "a", [number] * size)
        kept = sum(map(len, memory._kept.values()))
        assert kept == memory._tokens <= 20
    if sizes and sizes[-1]:
        last = memory.recall(ask(f"question {(len(sizes) - 1) % 7}", "a"))[1].tokens
        assert last == (len(sizes) - 1,) * sizes[-1]
