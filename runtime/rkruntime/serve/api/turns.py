"""From the messages that clients send to turns that a chat template accepts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rkruntime.text.template import Message


def alternating(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with user and assistant alternating, after at most one system message.

    Gemma was taught nothing else, and its template refuses the rest. Neighbours of one role become one message, system
    text after the first turn is the user's, and where the assistant begins, with a greeting, an empty message of the
    user stands before it.
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
