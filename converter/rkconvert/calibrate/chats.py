"""Conversations for calibration data: the user's texts and chats, and the shipped default."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from rkconvert.calibrate.dataset import is_unicode
from rkruntime.errors import CalibrationError
from rkruntime.files import read_error, read_regular
from rkruntime.text.template import ROLES, Message

_DEFAULT: Final = Path(__file__).with_name("default.yaml")
_MOST_BYTES: Final = 256 << 20
# ShareGPT's names, and OpenAI's newer one for a system message.
_ROLES: Final = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
}


@dataclass(frozen=True)
class Dialogue:
    """A conversation up to a question, and its answer if there is one.

    Attributes:
        origin: File and position, for messages.
    """

    messages: tuple[Message, ...]
    answer: str
    origin: str

    def under(self, system: str) -> Dialogue:
        """Return the same conversation with this system prompt, unless it has its own."""
        if not system or self.messages[0].role == "system":
            return self
        return replace(self, messages=(Message("system", system), *self.messages))


def default_chats() -> list[Dialogue]:
    """Return the chats that come with RKEdge: short questions of many kinds and languages."""
    rows = yaml.safe_load(_DEFAULT.read_text(encoding="utf-8"))
    return [
        Dialogue((Message("user", row["question"]),), row["answer"], f"default.yaml, row {number}")
        for number, row in enumerate(rows, start=1)
    ]


def read_texts(path: Path) -> list[Dialogue]:
    """Read one question per line; text after a TAB is its answer. Raises CalibrationError."""
    chats = []
    for number, line in enumerate(_lines(_read(path)), start=1):
        question, _, answer = line.partition("\t")
        if question.strip():
            chats.append(Dialogue((Message("user", question.strip()),), answer.strip(), f"{path}, line {number}"))
    return _some(chats, path)


def read_chats(path: Path) -> list[Dialogue]:
    """Read conversations from JSON lines or a JSON list: `{"messages": [{"role", "content"}]}` as in OpenAI's API, or
    `{"conversations": [{"from", "value"}]}` as in ShareGPT.

    Raises:
        CalibrationError: With the position of the error.
    """
    return _some([_chat(item, origin) for item, origin in _items(path)], path)


def _some(chats: list[Dialogue], path: Path) -> list[Dialogue]:
    if not chats:
        raise CalibrationError(f"{path} contains no text.")
    return chats


def _read(path: Path) -> str:
    try:
        return read_regular(path, _MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise CalibrationError(
                f"{path} exceeds {_MOST_BYTES >> 20} MiB.", hint="Use a part of it: a few dozen chats are enough."
            ) from error
        raise read_error(path, error, CalibrationError) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text in UTF-8: {error}.", hint="Save it as UTF-8.") from error


def _lines(text: str) -> list[str]:
    """Split into lines as editors and JSONL do; Python's splitlines also cuts at characters that occur in texts."""
    return re.split(r"\r\n|\n|\r", text)


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    text = _read(path)
    if text.lstrip().startswith("["):
        for number, item in enumerate(_parse(text, str(path)), start=1):
            yield item, f"{path}, item {number}"
        return
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            yield _parse(line, f"{path}, line {number}"), f"{path}, line {number}"


def _parse(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{origin} is not JSON: {error}.") from error


def _chat(item: Any, origin: str) -> Dialogue:
    if isinstance(item, Mapping) and isinstance(item.get("messages"), list):
        found = [_message(part, "role", "content", origin) for part in item["messages"]]
    elif isinstance(item, Mapping) and isinstance(item.get("conversations"), list):
        found = [_message(part, "from", "value", origin) for part in item["conversations"]]
    else:
        raise CalibrationError(
            f"{origin} is not a conversation: it has no list 'messages' or 'conversations'.",
            hint='Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        )
    # A final answer is the target; a chat without one ends with its question.
    answer = found.pop().content if found and found[-1].role == "assistant" else ""
    if not found or found[-1].role != "user":
        raise CalibrationError(f"{origin} must end with a user's question, or with the answer to one.")
    return Dialogue(tuple(found), answer, origin)


def _message(part: Any, role: str, content: str, origin: str) -> Message:
    name = part.get(role) if isinstance(part, Mapping) else None
    text = part.get(content) if isinstance(part, Mapping) else None
    if not isinstance(text, str) or not isinstance(name, str):
        raise CalibrationError(f"{origin}: a message needs {role!r} and {content!r}, both strings.")
    if not is_unicode(text):
        raise CalibrationError(f"{origin}: a message contains half of a surrogate pair, which is not a character.")
    if name not in _ROLES:
        raise CalibrationError(f"{origin}: there is no role {name!r}; roles are {', '.join(_ROLES)}.")
    return Message(_ROLES[name], text)
