"""Text from outside on a terminal or in a log: nothing in it is an instruction to either."""

from __future__ import annotations

import re
from typing import Final

# C0 but for tab and line feed, DEL, C1, line and paragraph separator, what turns the direction of writing, and what is
# no character at all and could not be written (half of a surrogate pair: a byte of a file's name that is not UTF-8).
_HARMFUL: Final = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL: Final = re.compile(f"[{_HARMFUL}]")
_BREAK: Final = re.compile(f"[\n{_HARMFUL}]")


def printable(text: str) -> str:
    """`text` without control characters; tabs and line feeds stay. For what has lines: an answer, a listing."""
    return _CONTROL.sub("", text)


def escaped(document: str) -> str:
    """A JSON document with control characters as `\\uXXXX`: json.dumps leaves most of them, half surrogates too."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", document)


def one_line(text: str) -> str:
    """`text` with control characters and line feeds spelled out (`\\x1b`). For messages, names and log lines."""
    return _BREAK.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
