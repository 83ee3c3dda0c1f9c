"""Check JSON bodies against the schemas of openapi.yaml, with the JSON Schema keywords used there.

fastjsonschema is twice as fast, but does not say which field of an alternative is wrong, or why; and the walk that
drops and names unknown fields would still be needed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from rkruntime.errors import BodyError

Schema = Mapping[str, Any]

# Most names in the header: the answer itself may have only a few words.
_MOST_IGNORED: Final = 16
_LONGEST_IGNORED: Final = 48

_TYPES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: (
        (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    ),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
# Deepest nesting: far more than clients send, but far below Python's recursion limit, which code that later reads the
# values would hit.
_MAX_DEPTH: Final = 64
# Most values in a body; each takes up to 150 bytes of memory, however short. A context has at most 16,384 tokens, and
# a request 4,096 messages of a few values.
_MAX_VALUES: Final = 1 << 16


class Ignored:
    """Names of a request's fields that have no effect, such as `options.num_ctx`; as many as a header holds.

    The schema refuses unsupported fields that would change an answer. The rest is reported.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """Note a name; a field of several items in a list counts once."""
        if len(self._names) <= _MOST_IGNORED:
            name = re.sub(r"\[\d+\]", "[]", name[: 2 * _LONGEST_IGNORED])[:_LONGEST_IGNORED]
            self._names[re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", name) or "?"] = None

    @property
    def names(self) -> list[str]:
        """The names for a header: ASCII, with `...` for those that did not fit."""
        names = list(self._names)
        return [*names[:_MOST_IGNORED], "..."] if len(names) > _MOST_IGNORED else names


def parse_json(body: bytes) -> Any:
    """Parse JSON. Raises BodyError, also for NaN, infinity and numbers that round to infinity.

    An object with one key twice is refused: parsers differ in which of the values they take.

    The memory it takes, and the time for which no other thread runs, are bounded by the text's length and by the
    number of values.
    """
    _check_number(body)

    def refuse(name: str) -> Any:
        raise BodyError(f"The body is not JSON: {name[:20]} is not a number.")

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise BodyError(f"The body has the key {twice[:80]!r} twice in one object.")
        return found

    try:
        data = json.loads(body.decode(), parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise BodyError(f"The body is not UTF-8 from byte {error.start:,} on.") from error
    except RecursionError as error:
        raise _too_deep() from error
    except json.JSONDecodeError as error:
        raise BodyError(f"The body is not JSON: {error}." if body.strip() else "The body is empty.") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise BodyError("The body has a number with too many digits.") from error
    _check_depth(data)
    return data


def _check_number(body: bytes) -> None:
    """Raise BodyError if there are too many values: each value except the first follows a comma or bracket."""
    if len(body) <= _MAX_VALUES:
        return
    # After this, every remaining quote begins or ends a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') <= 4 * _MAX_VALUES:
        outside = b"".join(plain.split(b'"')[::2])
        if sum(map(outside.count, (b",", b"[", b"{"))) <= _MAX_VALUES:
            return
    raise BodyError(
        f"The body has more than {_MAX_VALUES:,} values.", details={"status": 413, "code": "too_many_values"}
    )


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> BodyError:
    return BodyError(f"The body is nested more than {_MAX_DEPTH} levels deep.")


class Validator:
    """Read values according to one document's schemas.

    Args:
        document: OpenAPI 3.1 document with `components.schemas`.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas: Mapping[str, Schema] = document["components"]["schemas"]

    def read(self, name: str, value: Any, ignored: Ignored) -> Any:
        """Return what the schema `name` declares of `value`, without nulls in objects, and with integers as int.

        Args:
            ignored: Collects properties that the schema does not declare, or marks as `x-ignored`, empty texts where it
                says `x-empty-ignored`, and numbers that are taken for their maximum where it says `x-capped`.

        Raises:
            BodyError: `value` does not match the schema; the message names the field.
        """
        return self._read(self._schemas[name], value, "", ignored)

    def _read(self, schema: Schema, value: Any, where: str, ignored: Ignored) -> Any:
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return self._read_any(schema, value, where, ignored)
        if "x-capped" in schema and _is_number(value) and value > schema["maximum"]:
            ignored.add(where)
            return schema["maximum"]
        for word, rule in _RULES.items():
            if word in schema and not rule(schema[word], value):
                raise _error(schema, word, value, where)
        if value == "" and "x-empty-ignored" in schema:
            ignored.add(where)
        if isinstance(value, dict):
            return self._read_object(schema, value, where, ignored)
        if isinstance(value, list) and "items" in schema:
            return [self._read(schema["items"], item, f"{where}[{at}]", ignored) for at, item in enumerate(value)]
        if isinstance(value, float) and "integer" in schema.get("type", ()):
            return int(value)
        return value

    def _resolved(self, schema: Schema) -> Schema:
        return self._schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def _read_any(self, schema: Schema, value: Any, where: str, ignored: Ignored) -> Any:
        """Read a value by the first alternative that matches, or raise the error of the last one of its type."""
        for alternative in schema["anyOf"]:
            with suppress(BodyError):
                return self._read(alternative, value, where, ignored)
        alike = [item for item in schema["anyOf"] if _is_type(item["type"], value)]
        if not alike:
            either = [name for item in schema["anyOf"] for name in _types(item)]
            raise _error({**schema, "type": either}, "type", value, where)
        return self._read(alike[-1], value, where, ignored)

    def _read_object(self, schema: Schema, value: Mapping[str, Any], where: str, ignored: Ignored) -> Mapping[str, Any]:
        if "properties" not in schema:
            return value
        properties, known = schema["properties"], {}
        # Fields that this daemon cannot handle are reported before errors in other fields, such as the empty content of
        # a message with tool calls.
        for name in sorted(value, key=lambda name: "x-says" not in self._resolved(properties.get(name, {}))):
            item = value[name]
            if name in properties:
                known[name] = self._read(properties[name], item, _name(where, name), ignored)
            if item is not None and (name not in properties or "x-ignored" in properties[name]):
                ignored.add(_name(where, name[:_LONGEST_IGNORED]))
        # Checked last, because a part of another kind, such as an image, lacks a text for a reason.
        for name in schema.get("required", ()):
            if name not in value:
                raise BodyError(f"{_name(where, name)} is missing.", hint="", details={"param": _name(where, name)})
        return {name: item for name, item in known.items() if item is not None}


def _types(schema: Schema) -> list[str]:
    wanted = schema["type"]
    return [wanted] if isinstance(wanted, str) else wanted


def _is_type(wanted: str | list[str], value: Any) -> bool:
    return any(_TYPES[name](value) for name in ([wanted] if isinstance(wanted, str) else wanted))


def _is_number(value: Any) -> bool:
    return _TYPES["number"](value)


# Keywords that do not apply to a value's type let it pass, as in JSON Schema.
_RULES: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "type": _is_type,
    "enum": lambda wanted, value: any(value == item and type(value) is type(item) for item in wanted),
    "minimum": lambda wanted, value: not _is_number(value) or value >= wanted,
    "maximum": lambda wanted, value: not _is_number(value) or value <= wanted,
    "minLength": lambda wanted, value: not isinstance(value, str) or len(value) >= wanted,
    "maxLength": lambda wanted, value: not isinstance(value, str) or len(value) <= wanted,
    "pattern": lambda wanted, value: not isinstance(value, str) or re.search(wanted, value) is not None,
    "minItems": lambda wanted, value: not isinstance(value, list) or len(value) >= wanted,
    "maxItems": lambda wanted, value: not isinstance(value, list) or len(value) <= wanted,
}

# Names of JSON types for messages.
_KINDS: Final[Mapping[str, str]] = {
    "null": "empty",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a JSON object",
}


def kind_of(value: Any) -> str:
    """Return what a JSON value is called in a message."""
    return _KINDS[next(name for name, test in _TYPES.items() if test(value))]


def _a(names: Iterable[str]) -> str:
    """Return the names of types in words, without null: that a field may also be empty is not worth saying."""
    return " or ".join(dict.fromkeys(_KINDS[name] for name in names if name != "null"))


# What is wrong with a field, by keyword: the end of a sentence that begins with the field's name.
_SAYINGS: Final[Mapping[str, Callable[[Schema, Any], str]]] = {
    "type": lambda schema, value: f"must be {_a(_types(schema))}, not {kind_of(value)}",
    "enum": lambda schema, _: f"must be {' or '.join(json.dumps(item) for item in schema['enum'] if item is not None)}",
    "minimum": lambda schema, _: f"must be {_range(schema)}",
    "maximum": lambda schema, _: f"must be {_range(schema)}",
    "minLength": lambda *_: "must not be empty",
    "maxLength": lambda schema, value: f"has {len(value):,} characters; at most {schema['maxLength']:,} are allowed",
    "minItems": lambda *_: "must have at least one entry",
    "maxItems": lambda schema, value: f"has {len(value):,} entries; at most {schema['maxItems']:,} are allowed",
}


def _range(schema: Schema) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if most is None:
        return f"at least {least:,}"
    return f"at most {most:,}" if least is None else f"from {least:,} to {most:,}"


def _error(schema: Schema, word: str, value: Any, where: str) -> BodyError:
    if "x-says" in schema:
        message = f"{where or 'The body'}: {schema['x-says']}"
    else:
        reason = f" {schema['description']}" if "description" in schema else ""
        message = f"{where or 'The body'} {_SAYINGS[word](schema, value)}.{reason}"
    return BodyError(message, hint="", details={"param": where or None})


def _name(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
