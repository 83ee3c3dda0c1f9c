"""YAML from strangers: plain data, each key once, nothing that grows while it is read.

PyYAML's safe loaders build no objects, and still have four faults here: libyaml's loader ends the process by a stack
overflow when lists are nested deeply, aliases make a short text stand for gigabytes, of two equal keys the first is
dropped silently, and `1:30` is a number to the base of 60, whose reading takes time with the square of its length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from math import isfinite
from pathlib import Path
from typing import Any, Final

import yaml

from rkruntime.files import read_regular

MAX_FILE: Final = 1 << 20
"""Bytes. Such files have a few thousand."""
_MAX_DEPTH: Final = 32
_TAG: Final = "tag:yaml.org,2002:"
# The runtime stays usable without libyaml; with it, loading is ten times faster.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {twice[:80]!r} stands twice")
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """As PyYAML, but `1:30` is a text, and numbers are those of JSON and C."""
        if ":" in node.value:
            return str(node.value)
        whole = node.tag.endswith("int")
        value: int | float = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if not (abs(value) < 1 << 63 if whole else isfinite(value)):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {node.value[:40]!r} is not a number to count with")
        return value


def _plain_types() -> None:
    """JSON's types only: dates and times are texts, sets and bytes are refused."""
    known = _Loader.yaml_constructors
    text, undefined = known[_TAG + "str"], known[None]
    numbers = dict.fromkeys(("int", "float"), _Loader.construct_number)
    others = dict.fromkeys(("binary", "omap", "pairs", "set"), undefined)
    for name, constructor in {**numbers, **others, "timestamp": text}.items():
        _Loader.add_constructor(_TAG + name, constructor)


_plain_types()


def load_yaml(text: str | bytes) -> Any:
    """The one document of a text (JSON is YAML too).

    Raises:
        yaml.YAMLError: no YAML, or with aliases, a key that stands twice, something that JSON does not have, or lists
            and mappings nested more than 32 deep.
    """
    try:
        _check(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as an integer of 5,000 digits.
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def _check(text: str | bytes) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{event.anchor}: aliases are not taken here")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested over {_MAX_DEPTH} deep")


def read_mapping(path: Path, fail: Callable[[str], Exception]) -> dict[str, Any]:
    """The mapping that a file holds; an empty file is an empty one.

    Raises:
        what `fail` makes of "cannot be read: WHY" and the like.
    """
    try:
        data = read_regular(path, MAX_FILE)
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror or error}") from error
    try:
        content = load_yaml(data.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise fail(f"is not YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise fail(f"holds no keys: it is {type(content).__name__}")
    strange = next((key for key in content or () if not isinstance(key, str)), None)
    if strange is not None:
        raise fail(f"has the key {strange!r}, which is no text")
    return content or {}
