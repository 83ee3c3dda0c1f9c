"""Texts from outside in Markdown: shown literally, whatever markup they contain."""

from __future__ import annotations

import re
import shlex
from typing import Final

from rkruntime.printable import one_line

# Not an underscore within a word: there it is never markup, and addresses have them.
_MARKUP: Final = re.compile(r"[\\`*\[\]<>#|!~&]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: str) -> str:
    """Return `text` on one line, with its markup escaped."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def argument(text: str) -> str:
    """Return `text` as an argument of a command in an `sh` block."""
    return shlex.quote(one_line(text))
