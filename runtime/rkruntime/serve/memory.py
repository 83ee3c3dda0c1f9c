"""Remember the token ids of answers to stateless clients, so that the answers re-enter prompts as generated.

Such a client sends the whole conversation as text with each request. Encoding an answer's text again may give different
ids from those generated, and then the KV cache on the NPU no longer matches.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from rkruntime.serve.users import User
from rkruntime.text.template import Message
from rkruntime.text.vocabulary import Vocabulary

# Assumed bytes of an answer besides its ids, which take 4 each, including a user with only this answer.
_ENTRY: Final = 1024


class AnswerMemory:
    """Ids of answers, by user and preceding conversation. Thread-safe.

    No answer depends on what other users asked: a user gets only the ids of their own answers, and only ids that decode
    to exactly the text that the user sends. The user who holds the most loses their least recently used answers first.

    Args:
        vocabulary: Vocabulary of the model that gives the answers; each model has its own memory.
        capacity: Limit of all answers together in bytes.
    """

    def __init__(self, vocabulary: Vocabulary, capacity: int = 4 << 20) -> None:
        self._vocabulary = vocabulary
        self._capacity = capacity
        self._kept: dict[User, _Answers] = {}
        self._lock = threading.Lock()

    def remember(self, user: User, messages: Sequence[Message], text: str, tokens: Sequence[int]) -> None:
        """Keep the ids of the answer to `messages`, without ids beyond its text."""
        said = self._vocabulary.saying(tokens, text)
        if said is None or _size(said) > self._capacity:
            return
        *_, key = _keys([*messages, Message("assistant", text)])
        with self._lock:
            self._kept.setdefault(user, _Answers()).put(key, array("i", said))
            while sum(answers.size for answers in self._kept.values()) > self._capacity:
                most = max(self._kept, key=lambda one: self._kept[one].size)
                self._kept[most].forget_oldest()
                if not self._kept[most].size:
                    del self._kept[most]

    def recall(self, user: User, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` with the ids of the answers that are remembered."""
        recalled = []
        for message, key in zip(messages, _keys(messages), strict=True):
            if message.role == "assistant" and (known := self._known(user, key)) is not None:
                # A client may have trimmed the text.
                message = replace(message, tokens=self._vocabulary.saying(known, message.content))
            recalled.append(message)
        return recalled

    def _known(self, user: User, key: bytes) -> array[int] | None:
        with self._lock:
            answers = self._kept.get(user)
            return answers.get(key) if answers else None


class _Answers:
    """One user's answers, least recently used first."""

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        self.size = 0

    def put(self, key: bytes, ids: array[int]) -> None:
        if key in self._ids:
            self.size -= _size(self._ids.pop(key))
        self._ids[key] = ids
        self.size += _size(ids)

    def get(self, key: bytes) -> array[int] | None:
        ids = self._ids.get(key)
        if ids is not None:
            self._ids.move_to_end(key)
        return ids

    def forget_oldest(self) -> None:
        self.size -= _size(self._ids.popitem(last=False)[1])


def _size(ids: Sequence[int]) -> int:
    return _ENTRY + 4 * len(ids)


def _keys(messages: Sequence[Message]) -> Iterator[bytes]:
    """Yield a digest of the conversation up to each message. Contents are stripped, as by templates and clients."""
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        content = message.content.strip().encode("utf-8", "surrogatepass")
        digest.update(f"{message.role} {len(content)} ".encode() + content)
        yield digest.copy().digest()
