"""Turn the messages that clients send into turns that a chat template accepts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rkruntime.text.template import Message


def alternating(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with user and assistant alternating, after at most one system message.

    Gemma was trained on nothing else, and its template refuses other orders. Adjacent messages of one role are joined,
    system text after the first turn becomes the user's, and an empty user message is put before an assistant that
    begins the conversation with a greeting.
    """
    begun = False
    turns: list[Message] = []
    for message in messages:
        begun = begun or message.role != "system"
        turns.append(Message("user", message.content) if begun and message.role == "system" else message)
    joined = [
        Message(role, "\n\n".join(filter(None, (message.content for message in group))))
        for role, group in groupby(turns, key=lambda message: message.role)
    ]
    first = next((at for at, message in enumerate(joined) if message.role != "system"), len(joined))
    if first < len(joined) and joined[first].role == "assistant":
        joined.insert(first, Message("user", ""))
    return joined
