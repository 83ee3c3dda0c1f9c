"""Make text from outside safe for a terminal or a log, so that neither takes anything in it as an instruction."""

from __future__ import annotations

import re
from typing import Final

# C0 except tab and line feed, DEL, C1, line and paragraph separators, characters that change the writing direction, and
# what cannot be encoded (half of a surrogate pair: a byte of a file name that is not UTF-8).
_HARMFUL: Final = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL: Final = re.compile(f"[{_HARMFUL}]")
_BREAK: Final = re.compile(f"[\n{_HARMFUL}]")


def printable(text: str) -> str:
    """Return `text` without control characters except tab and line feed. For text with lines: an answer, a listing."""
    return _CONTROL.sub("", text)


def escaped(document: str) -> str:
    """Return a JSON document with control characters as `\\uXXXX`: json.dumps leaves most as they are."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", document)


def one_line(text: str) -> str:
    """Return `text` with control characters and line feeds escaped (`\\x1b`). For messages, names and log lines."""
    return _BREAK.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def well_formed(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced by U+FFFD: JSON can contain "\\ud800"."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
