"""Texts from outside in Markdown: as they are, whatever they look like."""

from __future__ import annotations

import shlex
from typing import Final

from rkruntime.printable import one_line

_MARKUP: Final = frozenset("\\`*_[]<>#|!~&")


def plain(text: str) -> str:
    """`text` on one line, without markup."""
    return "".join(f"\\{letter}" if letter in _MARKUP else letter for letter in one_line(text))


def argument(text: str) -> str:
    """`text` as an argument of a command in an `sh` block."""
    return shlex.quote(one_line(text))
