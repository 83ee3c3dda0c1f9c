"""The ids of answers that went to stateless clients, so that they come back as they were generated.

Such a client sends the whole conversation as text with each request. Encoding an answer's text again may give other ids
than were generated, and then the KV cache on the NPU no longer fits.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rkruntime.text.template import Message


class AnswerMemory:
    """Ids by the conversation that led to them, the longest unused forgotten first. For any thread.

    Args:
        capacity: tokens to keep, all answers together (4 bytes each).
    """

    def __init__(self, capacity: int = 1 << 19) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[bytes, array[int]] = OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def remember(self, messages: Sequence[Message], text: str, tokens: Sequence[int]) -> None:
        """Keep the ids of the answer to `messages`."""
        if not tokens or len(tokens) > self._capacity:
            return
        *_, key = _keys([*messages, Message("assistant", text)])
        with self._lock:
            self._tokens += len(tokens) - len(self._kept.pop(key, ()))
            self._kept[key] = array("i", tokens)
            while self._tokens > self._capacity:
                self._tokens -= len(self._kept.popitem(last=False)[1])

    def recall(self, messages: Sequence[Message]) -> list[Message]:
        """`messages`, with the ids of those answers that are remembered."""
        recalled = []
        for message, key in zip(messages, _keys(messages), strict=True):
            known = self._take(key) if message.role == "assistant" else None
            if known is not None:
                message = replace(message, tokens=tuple(known))
            recalled.append(message)
        return recalled

    def _take(self, key: bytes) -> array[int] | None:
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
            return known

    def clear(self) -> None:
        """Forget all: another model has other ids."""
        with self._lock:
            self._kept.clear()
            self._tokens = 0


def _keys(messages: Sequence[Message]) -> Iterator[bytes]:
    """A digest of the conversation up to each message. Templates strip contents, and so do clients."""
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        content = message.content.strip().encode("utf-8", "surrogatepass")
        digest.update(f"{message.role} {len(content)} ".encode() + content)
        yield digest.copy().digest()
