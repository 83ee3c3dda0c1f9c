"""Turns as token ids: what was generated stays as it was, and a saved file is not believed blindly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.engine.generation import FinishReason
from rkruntime.errors import ContextFullError, InputError
from rkruntime.text.answer import Answer
from rkruntime.text.conversation import Conversation
from rkruntime.text.prompts import PromptMaker
from rkruntime.text.template import GemmaTemplate, Message
from rkruntime.text.tokenizer import Tokenizer


def answered(text: str, tokens: tuple[int, ...]) -> Answer:
    return Answer(text, tokens, FinishReason.STOP, 0)


@pytest.fixture
def conversation(tokenizer: Tokenizer) -> Conversation:
    return Conversation(PromptMaker(tokenizer, GemmaTemplate(tokenizer)), "Be brief.")


def letters(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer._backend.token_to_id(letter) for letter in text)


def test_each_prompt_begins_with_the_last_and_its_answer(conversation: Conversation, tokenizer: Tokenizer) -> None:
    before = conversation.prompt("How many?", 512)[0]
    kept = letters(tokenizer, "Three")
    conversation.add("How many?", answered("Three", kept))
    after = conversation.prompt("Sure?", 512)[0]
    assert after[: len(before) + len(kept)] == [*before, *kept]


def test_saving_and_loading_keeps_the_ids(conversation: Conversation, tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversation.add("How many?", answered("Three", letters(tokenizer, "Three")))
    conversation.save(tmp_path / "talk.json")
    again = Conversation(PromptMaker(tokenizer, GemmaTemplate(tokenizer)))
    again.load(tmp_path / "talk.json")
    assert again.system == "Be brief."
    assert again.prompt("Sure?", 512)[0] == conversation.prompt("Sure?", 512)[0]


@pytest.mark.parametrize("lie", ["control", "other", "range", "type", "cut"])
def test_ids_that_say_something_else_are_not_believed(
    conversation: Conversation, tokenizer: Tokenizer, lie: str
) -> None:
    honest = letters(tokenizer, "Three")
    lies: dict[str, list[Any]] = {
        "control": [*honest, tokenizer.control["<end_of_turn>"], tokenizer.control["<start_of_turn>"]],
        "other": list(letters(tokenizer, "Four")),
        "range": [*honest, 1 << 40],
        "type": [*honest, "5"],
        "cut": list(honest[:-1]),
    }
    conversation.add("How many?", answered("Three", honest))
    data = json.loads(json.dumps(conversation.as_dict()))
    data["messages"][1]["tokens"] = lies[lie]
    conversation.restore(data)
    assert conversation.messages[1].tokens is None


def test_what_was_generated_behind_a_stop_string_is_not_kept(conversation: Conversation, tokenizer: Tokenizer) -> None:
    conversation.add("How many?", answered("Thr", letters(tokenizer, "Three")))
    conversation.add("None?", answered("", letters(tokenizer, "Three")))
    assert [item.tokens for item in conversation.messages] == [None, letters(tokenizer, "Thr"), None, None]
    data = json.loads(json.dumps(conversation.as_dict()))
    # A file of somebody else, or of an older release.
    for kept in data["messages"][1::2]:
        kept["tokens"] = letters(tokenizer, "Three")
    conversation.restore(data)
    assert [item.tokens for item in conversation.messages] == [None] * 4


@given(data=st.data())
def test_a_prompt_says_what_its_messages_say(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whatever ids stand beside an answer's text, wherever they come from."""
    ids = data.draw(st.lists(st.integers(-1, tokenizer.vocab_size), max_size=6))
    content = data.draw(st.sampled_from([tokenizer.decode(ids), tokenizer.decode(ids)[:3], "", " x ", "\ufffd"]))
    maker = PromptMaker(tokenizer, GemmaTemplate(tokenizer))
    messages = [Message("user", "a"), Message("assistant", content, tuple(ids)), Message("user", "b")]
    plain = [messages[0], Message("assistant", content), messages[2]]
    found, expected = (maker.prompt(talk, 4096)[0] for talk in (messages, plain))
    controls = set(tokenizer.control.values())
    assert [one for one in found if one in controls] == [one for one in expected if one in controls]
    assert tokenizer.decode(found) in (
        tokenizer.decode(expected),
        f"user\na\nmodel\n{content}\nuser\nb\nmodel\n",
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "nonsense",
        "[" * 100_000,
        '{"schema": "other"}',
        '{"schema": "rkedge-conversation/1"}',
        '{"schema": "rkedge-conversation/1", "messages": [{"role": "system", "content": "x"}]}',
        '{"schema": "rkedge-conversation/1", "messages": [{"role": "user", "content": 5}]}',
        '{"schema": "rkedge-conversation/1", "messages": [7]}',
        '{"schema": "rkedge-conversation/1", "messages": [{"role": "assistant", "content": "x"}]}',
        '{"schema": "rkedge-conversation/1", "messages": [{"role": "user", "content": "x"}]}',
        '{"schema": "rkedge-conversation/1", "system": 1, "messages": []}',
    ],
)
def test_files_that_are_no_conversation(
    conversation: Conversation, tokenizer: Tokenizer, tmp_path: Path, content: str
) -> None:
    conversation.add("a", answered("b", ()))
    (tmp_path / "talk.json").write_text(content)
    before = conversation.as_dict()
    with pytest.raises(InputError):
        conversation.load(tmp_path / "talk.json")
    assert conversation.as_dict() == before


def test_missing_file(conversation: Conversation, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        conversation.load(tmp_path / "none.json")


def test_a_full_context_is_an_error_or_drops_turns(conversation: Conversation, tokenizer: Tokenizer) -> None:
    for number in range(10):
        conversation.add(f"question {number}", answered("answer " * 5, ()))
    whole = len(conversation.prompt("last", 4096)[0])
    with pytest.raises(ContextFullError, match=f"{whole}"):
        conversation.prompt("last", whole)
    tokens, dropped = conversation.prompt("last", whole, drop=True)
    assert dropped == 1
    assert len(conversation.messages) == 20
    assert "Be brief.\n\nquestion 1" in tokenizer.decode(tokens)
    with pytest.raises(ContextFullError):
        conversation.prompt("word " * 200, 64, drop=True)
    assert len(conversation.messages) == 20
    conversation.add("last", answered("yes", ()), dropped)
    assert [message.content for message in conversation.messages[::2]] == [
        *(f"question {n}" for n in range(1, 10)),
        "last",
    ]
