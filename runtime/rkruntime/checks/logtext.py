"""Turn logs from terminals, journals, containers and serial lines into plain lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

HEAD: Final = 256 * 1024
"""Bytes (of a file) or characters (of a text) that are kept of the start of a long log."""
TAIL: Final = 1024 * 1024
"""The same for its end."""

_PIECE = 4000
_OVERLAP = 200
_WIDEST_TERMINAL = 300
_NARROWEST_TERMINAL = 40

# ESC itself, or as `cat -v`, JSON and Python spell it; then a CSI, OSC or two-character sequence.
_ESCAPE = re.compile(
    r"(?:\x1b|\\x1b|\\u001b|\\033|\\e(?=\[)|\^\[(?=\[))"
    r"(?:\[[0-9;:?]{0,32}[ -/]{0,4}[@-~]|\][^\x07\x1b\n]{0,256}(?:\x07|\x1b\\)|[()*+][0-9A-Za-z]|[@-Z\\-_])",
    re.IGNORECASE,
)
# A color code whose ESC was lost on the way.
_BARE_COLOUR = re.compile(r"\[\d{1,2}(?:;\d{1,3}){0,4}m")
_SPELLED_CHARACTER = re.compile(r"\\u((?!d[89a-f])[0-9a-f]{4})", re.IGNORECASE)
_SPELLED_BREAK = re.compile(r"\\r\\n|\\n|\\r")
_BREAK = re.compile(r"\r\n|\n|\r|\x0b|\x0c|\x85|\u2028|\u2029")
# How a log line begins; the continuation of a wrapped line begins differently.
_BEGINNING = re.compile(
    r"[EWID][ /][A-Za-z]+ ?:|\[ ?\w|\d{4}-\d\d|[A-Z][a-z]{2} [ \d]\d |(?:INFO|WARNING|ERROR|DEBUG)\b|[-=*]{4}"
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069]")


def encoding(data: bytes) -> str:
    """Guess the encoding of a log from its byte order mark, its NUL bytes, or what decodes."""
    for mark, name in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"\xef\xbb\xbf", "utf-8")):
        if data.startswith(mark):
            return name
    # Without a mark: in UTF-16, every second byte of ASCII text is NUL.
    even, odd = data[0::2].count(0), data[1::2].count(0)
    if max(even, odd) > len(data) / 8 and min(even, odd) < len(data) / 50:
        return "utf-16-le" if odd > even else "utf-16-be"
    wrong = data.decode("utf-8", "replace").count("\ufffd")
    if wrong > 4:
        # Consoles of Chinese Windows write GBK. A few bad bytes are damage, not an encoding.
        try:
            (data[: data.rfind(b"\n") + 1] or data).decode("gb18030")
            return "gb18030"
        except UnicodeDecodeError:
            pass
    return "utf-8"


def decode(data: bytes) -> str:
    """Decode a log; undecodable bytes become U+FFFD."""
    return data.decode(encoding(data), "replace")


def clean_lines(text: str) -> list[str]:
    """Split a log into printable lines without escape sequences, control characters, trailing spaces and empty lines.

    A carriage return ends a line, so that each state of a progress bar is a line, and so does a spelled-out `\\n` (in
    a container's JSON log). Lines of more than 4000 characters are cut into overlapping pieces.
    """
    text = _BARE_COLOUR.sub("", _ESCAPE.sub("", text))
    text = _SPELLED_CHARACTER.sub(lambda match: chr(int(match[1], 16)), text)
    lines: list[str] = []
    for line in _BREAK.split(_SPELLED_BREAK.sub("\n", text)):
        plain = _CONTROL.sub("", line).rstrip()
        if len(plain) <= _PIECE:
            lines += [plain] if plain else []
        else:
            lines += [plain[at : at + _PIECE] for at in range(0, len(plain) - _OVERLAP, _PIECE - _OVERLAP)]
    return lines


def unwrapped(lines: Sequence[str]) -> Iterable[tuple[int, str]]:
    """Rejoin lines that a terminal broke at its width; yields pairs of the first line's index and the whole line.

    A line counts as broken if it fills the width (that of the longest line), or if the first word of the next line
    would not have fitted. Joining too much does little harm, because the original lines are kept.
    """
    width = max((len(line) for line in lines), default=0)
    if not _NARROWEST_TERMINAL <= width <= _WIDEST_TERMINAL:
        return
    at = 0
    while at < len(lines):
        whole, end = lines[at], at
        while end + 1 < len(lines) and len(whole) < _PIECE:
            joint = _joint(lines[end], lines[end + 1], width)
            if joint is None:
                break
            end += 1
            whole += joint + lines[end]
        if end > at:
            yield at, whole
        at = end + 1


def _joint(line: str, following: str, width: int) -> str | None:
    if _BEGINNING.match(following):
        return None
    if len(line) == width:
        return ""
    first_word = following.lstrip().partition(" ")[0]
    return " " if len(line) + 1 + len(first_word) > width else None
