"""Read untrusted YAML: plain data, each key once, nothing that expands while it is read.

PyYAML's safe loaders build no objects but still have four faults here: libyaml's loader crashes with a stack overflow
when lists are deeply nested, aliases make a short text expand to gigabytes, the first of two equal keys is silently
dropped, and they read YAML 1.1, where `1_0` is 10, `010` is 8, `1:30` is 90, `on` is true and `<<` merges. A scalar
that YAML 1.1 and 1.2 read differently is a string here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable
from math import isfinite
from pathlib import Path
from typing import Any, Final

import yaml

from rkruntime.files import read_regular

MAX_FILE: Final = 1 << 20
"""In bytes. Such files have a few thousand."""
_MAX_DEPTH: Final = 32
_TAG: Final = "tag:yaml.org,2002:"
# The runtime stays usable without libyaml; with it, loading is ten times faster.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {twice[:80]!r} occurs twice")
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        whole = node.tag.endswith("int")
        value: int | float = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if not (abs(value) < 1 << 63 if whole else isfinite(value)):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {node.value[:40]!r} is out of range")
        return value


# The types of unquoted scalars besides strings: their syntax, and the characters that they can begin with.
_PLAIN: Final = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    "float": (r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", [*"-+.0123456789"]),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
for _name in ("int", "float"):
    _Loader.add_constructor(_TAG + _name, _Loader.construct_number)


def load_yaml(text: str | bytes) -> Any:
    """Return the single document in a text (JSON is YAML too).

    Raises:
        yaml.YAMLError: It is not YAML, or has aliases, tags, a key that occurs twice, a number beyond 64 bits, or lists
            and mappings nested more than 32 deep.
    """
    try:
        _check(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: for example, an integer of 5,000 digits.
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def _check(text: str | bytes) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{event.anchor}: aliases are not accepted here")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if tag := getattr(event, "tag", None):
            raise yaml.YAMLError(f"the tag {tag[:80]!r}: tags are not accepted here")
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested over {_MAX_DEPTH} deep")


def read_mapping(path: Path, fail: Callable[[str], Exception]) -> dict[str, Any]:
    """Return the mapping in a file; an empty file is an empty mapping.

    Raises:
        The result of `fail` for "cannot be read: WHY" and the like.
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
        raise fail(f"must be a mapping, not {type(content).__name__}")
    strange = next((key for key in content or () if not isinstance(key, str)), None)
    if strange is not None:
        raise fail(f"has a key that is not a string: {strange!r}")
    return content or {}
