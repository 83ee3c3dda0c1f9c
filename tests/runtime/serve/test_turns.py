"""Messages as clients send them, as turns that Gemma's template accepts."""

from __future__ import annotations

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.serve.api.turns import alternating
from rkruntime.text.template import Message

# The order that google/gemma-2-2b-it's tokenizer_config.json asks for.
PICKY = jinja2.Template(
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ 1 / 0 }}{% endif %}{{ m.content }}|{% endfor %}"
)


def turns(*pairs: str) -> list[Message]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(roles[pair[0]], pair[1:]) for pair in pairs]


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (["s1", "u2", "a3", "u4"], ["s1", "u2", "a3", "u4"]),
        (["u1", "u2"], ["u1\n\n2"]),
        (["s1", "s2", "u3"], ["s1\n\n2", "u3"]),
        (["a1", "u2"], ["u", "a1", "u2"]),
        (["s1", "a2", "u3"], ["s1", "u", "a2", "u3"]),
        (["u1", "a2", "s3", "u4"], ["u1", "a2", "u3\n\n4"]),
        (["u1", "s2"], ["u1\n\n2"]),
        (["u1", "a2", "a", "a3", "u4"], ["u1", "a2\n\n3", "u4"]),
        (["s1"], ["s1"]),
        ([], []),
    ],
)
def test_turns(sent: list[str], read: list[str]) -> None:
    assert alternating(turns(*sent)) == turns(*read)


MESSAGES = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text(max_size=5)))


@given(MESSAGES)
def test_every_template_accepts_them_and_no_text_is_lost(messages: list[Message]) -> None:
    read = alternating(messages)
    assert alternating(read) == read
    if read:
        PICKY.render(messages=read)
    said = "\n\n".join(filter(None, (message.content for message in messages)))
    assert "\n\n".join(filter(None, (message.content for message in read))) == said


@given(MESSAGES, MESSAGES)
def test_what_was_answered_stays_as_it_was(before: list[Message], more: list[Message]) -> None:
    """Answers are found again by the turns before them, and the KV cache is reused by what they begin with."""
    asked = [*before, Message("user", "?")]
    read = alternating([*asked, Message("assistant", "!"), Message("user", "??"), *more])
    assert read[: len(alternating(asked))] == alternating(asked)
