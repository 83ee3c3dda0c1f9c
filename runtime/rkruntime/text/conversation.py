"""A conversation: turns with their generated token ids, the prompt for the next one, and the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from rkruntime.errors import InputError, OutputError, UsageError
from rkruntime.files import AnyPath, as_path, atomic_file, read_regular
from rkruntime.schema import check_value
from rkruntime.text.answer import Answer
from rkruntime.text.template import Message
from rkruntime.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rkruntime.text.prompts import Prompts

SCHEMA: Final = "rkedge-conversation/1"
_MAX_FILE: Final = 64 << 20


class Conversation:
    """Turns of user and assistant in order, and their system prompt.

    Attributes:
        system: System prompt; empty for none.
        messages: User and assistant alternating; the last is an answer.
    """

    def __init__(self, prompts: Prompts, system: str = "", messages: Iterable[Message] = ()) -> None:
        check_value("system", str, system)
        self._prompts = prompts
        self.system = system
        self.messages = list(messages)

    def prompt(self, text: str, max_context: int, *, drop: bool = False) -> tuple[list[int], int]:
        """Return token ids of the conversation so far plus `text`, and how many old turns were dropped to make room.

        Args:
            max_context: Context in tokens; a few are kept free for the beginning of an answer.
            drop: Drop the oldest turns until the prompt fits; the system prompt stays. `add` then forgets them.

        Raises:
            ContextFullError: The prompt does not fit.
            UsageError, BundleError: The template does not accept the conversation.
        """
        check_value("max_context", int, max_context)
        check_value("drop", bool, drop)
        system = [Message("system", self.system)] if self.system else []
        return self._prompts.prompt([*system, *self.messages, Message("user", text)], max_context, drop=drop)

    def add(self, text: str, answer: Answer, dropped: int = 0) -> None:
        """Add a turn: the question, and the answer's text with its generated ids.

        Args:
            dropped: Number of oldest turns to forget, because the answer's prompt had no room for them.
        """
        del self.messages[: 2 * dropped]
        # What was generated after the beginning of a stop string was never shown.
        tokens = self._prompts.vocabulary.saying(answer.tokens, answer.text)
        self.messages += [Message("user", text), Message("assistant", answer.text, tokens)]

    def clear(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.messages.clear()

    def take_back(self) -> str | None:
        """Forget the last turn; returns its question, or None if there is none."""
        if not self.messages:
            return None
        question = self.messages[-2].content
        del self.messages[-2:]
        return question

    def as_dict(self) -> dict[str, Any]:
        """Return the conversation as JSON types, as written by `save`."""
        return _as_dict(self.system, self.messages)

    def restore(self, data: Any) -> None:
        """Restore the result of `as_dict`, which may be old and another model's.

        Ids are kept only if they decode to the text stored with them; otherwise the text is encoded again.

        Raises:
            InputError: It is not a conversation.
            UsageError: The template does not accept its roles.
        """
        system, messages = _parse(data, self._prompts.vocabulary)
        self._prompts.check([*messages, Message("user", "")])
        self.system, self.messages = system, messages

    def save(self, path: AnyPath) -> None:
        """Write the conversation to a JSON file. Raises OutputError or HostError."""
        write_conversation(path, self.as_dict())

    def load(self, path: AnyPath) -> None:
        """Read a file that `save` wrote. Raises InputError."""
        try:
            self.restore(read_conversation(path))
        except UsageError as error:
            raise InputError(f"{path} is not a saved conversation: {error}") from error


def write_conversation(path: AnyPath, data: Mapping[str, Any]) -> None:
    """Write the result of `Conversation.as_dict` to a JSON file; overwrites only another such file.

    Raises:
        OutputError, HostError: It cannot be written, or something else is there.
    """
    path = as_path("path", path)
    if path.exists():
        try:
            read_conversation(path)
        except InputError as error:
            raise OutputError(
                f"{path} already exists and is not a saved conversation.", hint="Choose another file name."
            ) from error
    with atomic_file(path) as partial:
        # A lone surrogate, which JSON can contain, survives being written and read again.
        partial.write_bytes(f"{json.dumps(data, ensure_ascii=False, indent=1)}\n".encode("utf-8", "surrogatepass"))


def read_conversation(path: AnyPath) -> dict[str, Any]:
    """Read what `write_conversation` wrote. Raises InputError."""
    path = as_path("path", path)
    try:
        data = json.loads(read_regular(path, _MAX_FILE))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a saved conversation: {error}") from error
    return check_conversation(data)


def check_conversation(data: Any) -> dict[str, Any]:
    """Return the conversation in `data` as `Conversation.as_dict` would. Raises InputError if it is not one."""
    return _as_dict(*_parse(data, None))


def _as_dict(system: str, messages: Iterable[Message]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "system": system,
        "messages": [
            {"role": item.role, "content": item.content, **({"tokens": item.tokens} if item.tokens else {})}
            for item in messages
        ],
    }


def _parse(data: Any, vocabulary: Vocabulary | None) -> tuple[str, list[Message]]:
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        raise InputError(f"This is not a saved conversation: it has no schema {SCHEMA!r}.")
    system, items = data.get("system", ""), data.get("messages")
    if not isinstance(system, str) or not isinstance(items, list):
        raise InputError("A saved conversation has a text as its 'system', and a list of 'messages'.")
    return system, [_parse_message(item, vocabulary) for item in items]


def _parse_message(item: Any, vocabulary: Vocabulary | None) -> Message:
    role, content = (item.get(key) for key in ("role", "content")) if isinstance(item, Mapping) else (None, None)
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise InputError("A message of this saved conversation lacks a role ('user' or 'assistant') or a text.")
    tokens = item.get("tokens")
    return Message(role, content, _trusted(tokens, content, vocabulary) if role == "assistant" else None)


def _trusted(tokens: Any, content: str, vocabulary: Vocabulary | None) -> tuple[int, ...] | None:
    """Return ids from a file if they decode to exactly `content`, else None. Without a vocabulary, accept any ids."""
    if not isinstance(tokens, (list, tuple)) or not all(
        type(token) is int and 0 <= token < 1 << 31 for token in tokens
    ):
        return None
    if vocabulary is not None and vocabulary.saying(tokens, content) != tuple(tokens):
        return None
    return tuple(tokens)
