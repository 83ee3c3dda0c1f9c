"""Texts from outside in Markdown: as they are, whatever they look like."""

from __future__ import annotations

import re
import shlex
from typing import Final

from rkruntime.printable import one_line

# Not an underscore within a word: there it is never markup, and addresses have them.
_MARKUP: Final = re.compile(r"[\\`*\[\]<>#|!~&]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: str) -> str:
    """`text` on one line, without markup."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def argument(text: str) -> str:
    """`text` as an argument of a command in an `sh` block."""
    return shlex.quote(one_line(text))
