"""JSON bodies against the schemas of openapi.yaml, by those words of JSON Schema that it uses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from rkruntime.errors import BodyError

Schema = Mapping[str, Any]

# Of names in a header, which may stand before an answer of a few words.
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
# Far more than any client sends, and far less than Python's own limit, which hits whoever reads the values later.
_MAX_DEPTH: Final = 64
# Of a body, each of which takes up to 150 bytes in memory however short it is. A context has 16,384 tokens at most, and
# a request 4,096 messages of a few values.
_MAX_VALUES: Final = 1 << 16


class Ignored:
    """Names of a request's fields that have no effect, such as `options.num_ctx`; as many as a header holds.

    What would change an answer and cannot be had is refused by the schema. The rest is told.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """Note a name; the same in several items of a list counts once."""
        if len(self._names) <= _MOST_IGNORED:
            name = re.sub(r"\[\d+\]", "[]", name[: 2 * _LONGEST_IGNORED])[:_LONGEST_IGNORED]
            self._names[re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", name) or "?"] = None

    @property
    def names(self) -> list[str]:
        """For a header: ASCII, and `...` for what there was no room for."""
        names = list(self._names)
        return [*names[:_MOST_IGNORED], "..."] if len(names) > _MOST_IGNORED else names


def parse_json(body: bytes) -> Any:
    """A JSON text as values. Raises BodyError; NaN, infinity and what rounds to it are not JSON.

    What it takes in memory, and the time for which no other thread runs, is bounded by the text's length and by the
    number of values.
    """
    _check_number(body)

    def refuse(name: str) -> Any:
        raise BodyError(f"The body is not JSON: {name[:20]} is not a number.")

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    try:
        data = json.loads(body.decode(), parse_constant=refuse, parse_float=finite)
    except UnicodeDecodeError as error:
        raise BodyError(f"The body is not UTF-8: {error}.") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise BodyError(f"The body is not JSON: {error}.") from error
    _check_depth(data)
    return data


def _check_number(body: bytes) -> None:
    """Raise BodyError if there are too many values: in front of each one but the first stands a comma or bracket."""
    if len(body) <= _MAX_VALUES:
        return
    # What stands between quotes that no backslash precedes is not text.
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
    """Reads values by one document's schemas.

    Args:
        document: of OpenAPI 3.1, with `components.schemas`.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas: Mapping[str, Schema] = document["components"]["schemas"]

    def read(self, name: str, value: Any, ignored: Ignored) -> Any:
        """What the schema `name` knows of `value`: no other properties, no nulls in objects, integers as int.

        Args:
            ignored: is told of properties that the schema does not have, or has as `x-ignored`.

        Raises:
            BodyError: `value` is not as the schema has it; with the field.
        """
        return self._read(self._schemas[name], value, "", ignored)

    def _read(self, schema: Schema, value: Any, where: str, ignored: Ignored) -> Any:
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        if "anyOf" in schema:
            return self._read_any(schema, value, where, ignored)
        for word, rule in _RULES.items():
            if word in schema and not rule(schema[word], value):
                raise _error(schema, word, value, where)
        if isinstance(value, dict):
            return self._read_object(schema, value, where, ignored)
        if isinstance(value, list) and "items" in schema:
            return [self._read(schema["items"], item, f"{where}[{at}]", ignored) for at, item in enumerate(value)]
        if isinstance(value, float) and "integer" in schema.get("type", ()):
            return int(value)
        return value

    def _read_any(self, schema: Schema, value: Any, where: str, ignored: Ignored) -> Any:
        """One of the alternatives must fit; the error is that of the last one of the value's type, or of any."""
        for alternative in schema["anyOf"]:
            with suppress(BodyError):
                return self._read(alternative, value, where, ignored)
        alike = [item for item in schema["anyOf"] if "type" in item and _is_type(item["type"], value)]
        return self._read((alike or schema["anyOf"])[-1], value, where, ignored)

    def _read_object(self, schema: Schema, value: Mapping[str, Any], where: str, ignored: Ignored) -> Mapping[str, Any]:
        for name in schema.get("required", ()):
            if name not in value:
                raise BodyError(f"{_name(where, name)} is missing.", details={"param": _name(where, name)})
        if "properties" not in schema:
            return value
        properties, known = schema["properties"], {}
        for name, item in value.items():
            if name in properties:
                known[name] = self._read(properties[name], item, _name(where, name), ignored)
            if item is not None and (name not in properties or "x-ignored" in properties[name]):
                ignored.add(_name(where, name[:_LONGEST_IGNORED]))
        return {name: item for name, item in known.items() if item is not None}


def _is_type(wanted: str | list[str], value: Any) -> bool:
    return any(_TYPES[name](value) for name in ([wanted] if isinstance(wanted, str) else wanted))


def _is_number(value: Any) -> bool:
    return _TYPES["number"](value)


# Words that say nothing of a value's type let other types pass, as in JSON Schema.
_RULES: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "type": _is_type,
    "enum": lambda wanted, value: any(value == item and type(value) is type(item) for item in wanted),
    "minimum": lambda wanted, value: not _is_number(value) or value >= wanted,
    "maximum": lambda wanted, value: not _is_number(value) or value <= wanted,
    "exclusiveMinimum": lambda wanted, value: not _is_number(value) or value > wanted,
    "minLength": lambda wanted, value: not isinstance(value, str) or len(value) >= wanted,
    "maxLength": lambda wanted, value: not isinstance(value, str) or len(value) <= wanted,
    "pattern": lambda wanted, value: not isinstance(value, str) or re.search(wanted, value) is not None,
    "minItems": lambda wanted, value: not isinstance(value, list) or len(value) >= wanted,
    "maxItems": lambda wanted, value: not isinstance(value, list) or len(value) <= wanted,
}

_SAYINGS: Final[Mapping[str, str]] = {
    "type": "must be of type {wanted}, and is {kind}",
    "enum": "must be one of {wanted}",
    "minimum": "must be at least {wanted}",
    "maximum": "must be at most {wanted}",
    "exclusiveMinimum": "must be more than {wanted}",
    "minLength": "must have at least {wanted} characters",
    "maxLength": "must have at most {wanted} characters",
    "pattern": "must match {wanted}",
    "minItems": "must have at least {wanted} items",
    "maxItems": "must have at most {wanted} items",
}


def _error(schema: Schema, word: str, value: Any, where: str) -> BodyError:
    kind = next(name for name, test in _TYPES.items() if test(value))
    wanted = schema[word]
    wanted = " or ".join(map(json.dumps, wanted)) if isinstance(wanted, list) else str(wanted)
    reason = f" {schema['description']}" if "description" in schema else ""
    saying = _SAYINGS[word].format(wanted=wanted, kind=kind)
    return BodyError(f"{where or 'The body'} {saying}.{reason}", details={"param": where or None})


def _name(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
