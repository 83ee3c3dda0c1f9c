"""Comparable versions of RKLLM releases, drivers and packages."""

from __future__ import annotations

import re
from typing import Final

from packaging.version import Version

__all__ = ["Version", "version"]

# Bounded, because the version in a file or a log is hostile input.
_VERSION: Final = re.compile(r"\d{1,20}(?:\.\d{1,20}){0,5}(?:b\d{0,20})?", re.ASCII)


def version(text: str) -> Version:
    """Parse the version at the beginning of a text: `1.2.1b1` sorts before `1.2.1`; `5.10.160-rockchip` is 5.10.160.

    Raises:
        ValueError: The text does not begin with a number.
    """
    match = _VERSION.match(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} does not begin with a version")
    return Version(match.group())
