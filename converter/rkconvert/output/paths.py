"""Texts for reports, without the paths of this machine: bundles and reports are shown to others."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_PART: Final = r"""/[^\s/:"'`<>|,;()\[\]{}=]+"""
# Not after a word or a slash: and/or, 4/8, https://host/name, </s>.
_PATH: Final = rf"(?<![\w./<~\\])(?:{_PART}){{2,}}/?"
_QUOTED: Final = r"""(?<=["'])/[^"'\n/]+/[^"'\n]*(?=["'])"""
_URL: Final = re.compile("file://(?=/)")


def without_paths(value: Any, folders: Sequence[Path] = ()) -> Any:
    """Replace absolute paths in JSON types with the names of files, as in `.../api.py`.

    Args:
        folders: Folders whose paths may hold spaces, which end a path elsewhere; the home, working and temporary
            folders are known.
    """
    return _walk(value, _substitute(folders))


def bytes_without_paths(data: bytes, folders: Sequence[Path] = ()) -> bytes:
    """Do the same as `without_paths` for a log, which may not be text."""
    return os.fsencode(_substitute(folders)(os.fsdecode(data)))


def _substitute(folders: Sequence[Path]) -> Callable[[str], str]:
    private = (*folders, Path.home(), Path.cwd(), Path(tempfile.gettempdir()))
    known = {str(form) for path in private for form in (path.absolute(), path.resolve())} - {"/"}
    named = "|".join(re.escape(path) for path in sorted(known, key=len, reverse=True))
    pattern = re.compile(rf"{_QUOTED}|(?:{named})(?![\w-])(?:{_PART})*/?|{_PATH}")
    return lambda text: pattern.sub(_name, _URL.sub("", text))


def _name(match: re.Match[str]) -> str:
    """Return a file's name without its path; nothing of a path so short that its name may be a person's."""
    *folders, name = match[0].strip("/").split("/")
    return f".../{name}" if len(folders) > 1 else "..."


def _walk(value: Any, substitute: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return substitute(value)
    if isinstance(value, Mapping):
        return {key: _walk(item, substitute) for key, item in value.items()}
    return [_walk(item, substitute) for item in value] if isinstance(value, list | tuple) else value
