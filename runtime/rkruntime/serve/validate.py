"""JSON bodies against the schemas of openapi.yaml, by those words of JSON Schema that it uses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from rkruntime.errors import BodyError

Schema = Mapping[str, Any]

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


def parse_json(body: bytes) -> Any:
    """A JSON text as values. Raises BodyError; NaN and infinity are no JSON."""

    def refuse(name: str) -> Any:
        raise BodyError(f"The body is not JSON: {name} is no number.")

    try:
        return json.loads(body.decode(), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise BodyError(f"The body is not UTF-8: {error}.") from error
    except RecursionError as error:
        raise BodyError("The body is nested too deeply.") from error
    except ValueError as error:
        raise BodyError(f"The body is not JSON: {error}.") from error


class Validator:
    """Checks values against one document's schemas.

    Args:
        document: of OpenAPI 3.1, with `components.schemas`.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas: Mapping[str, Schema] = document["components"]["schemas"]

    def check(self, name: str, value: Any) -> None:
        """Raise BodyError, with the field, if `value` is not as the schema `name` has it."""
        self._check(self._schemas[name], value, "")

    def _check(self, schema: Schema, value: Any, where: str) -> None:
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        if "anyOf" in schema:
            self._check_any(schema, value, where)
        for word, rule in _RULES.items():
            if word in schema and not rule(schema[word], value):
                raise _error(schema, word, value, where)
        if isinstance(value, dict):
            self._check_object(schema, value, where)
        elif isinstance(value, list) and "items" in schema:
            for at, item in enumerate(value):
                self._check(schema["items"], item, f"{where}[{at}]")

    def _check_any(self, schema: Schema, value: Any, where: str) -> None:
        """One of the alternatives must fit; the error is that of the last one, where the fullest forms stand."""
        *others, last = schema["anyOf"]
        if not any(self._fits(alternative, value) for alternative in others):
            self._check(last, value, where)

    def _fits(self, schema: Schema, value: Any) -> bool:
        try:
            self._check(schema, value, "")
        except BodyError:
            return False
        return True

    def _check_object(self, schema: Schema, value: Mapping[str, Any], where: str) -> None:
        for name in schema.get("required", ()):
            if name not in value:
                raise BodyError(f"{_name(where, name)} is missing.", details={"param": _name(where, name)})
        properties = schema.get("properties", {})
        for name, item in value.items():
            if name in properties:
                self._check(properties[name], item, _name(where, name))


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
