"""What a client shows a person about a wrong request: a sentence that names the field, without a schema's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkruntime.errors import BodyError
from rkruntime.serve.api.validate import Ignored, Validator, parse_json
from rkruntime.serve.app import openapi

SPEECH = re.compile(
    r"\b(null|None|NoneType|dict|str|int|float|bool|boolean|integer|string|array|items?|schema|openapi|enum|regex"
    r"|of type|min(imum|Length|Items)|max(imum|Length|Items)|set_int_max_str_digits)\b|\\d|\^|\[0-9a-f]",
)
DOCUMENT = openapi()
SCHEMAS: Mapping[str, Any] = DOCUMENT["components"]["schemas"]
BODIES = [
    name for name, schema in SCHEMAS.items() if schema.get("type") == "object" and name not in ("Error", "TextPart")
]
WRONG: list[Any] = [
    None, True, False, -1, 0, 3.5, 10**30, -(10**30), "", "x", "x" * 2000, "\u202e\x1b[2J", [], [None], [[]],
    [""], [{}], [7], ["x"] * 5000, {}, {"type": "image_url"}, {"text": 7}, {"a": None},
    [{"type": "text", "text": None}], [{"role": "tool"}], [{"role": None, "content": {}}],
]  # fmt: skip


def resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def places(schema: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str | int, ...]]:
    """The paths of all fields, and of the first item of each list."""
    schema = resolved(schema)
    for alternative in schema.get("anyOf", ()):
        yield from places(alternative, depth)
    inner = {**schema.get("properties", {}), **({0: schema["items"]} if "items" in schema else {})}
    for name, field in inner.items() if depth < 5 else ():
        yield (name,)
        yield from ((name, *rest) for rest in places(field, depth + 1))


def put(path: tuple[str | int, ...], value: Any) -> Any:
    """The smallest body with a value there."""
    for name in reversed(path):
        value = [value] if isinstance(name, int) else {name: value}
    return value


def check_sentence(error: BodyError, body: Any) -> None:
    said, field = f"{error.message} {error.hint}".strip(), error.details.get("param")
    # Names of fields and values are OpenAI's and Ollama's.
    assert not SPEECH.search(re.sub(r'"[^"]*"', "", said.removeprefix(field or ""))), said
    assert re.search(r"[.?]$", said), said
    assert len(said) < 300, said
    if isinstance(body, dict) and body:
        assert field, said
        assert said.startswith(field), said


@pytest.mark.parametrize("name", BODIES)
def test_each_field_with_each_wrong_value(name: str) -> None:
    validator, refused = Validator(DOCUMENT), 0
    paths = sorted(set(places(SCHEMAS[name])), key=str)
    assert paths
    for path in paths:
        for value in WRONG:
            body = put(path, value)
            try:
                validator.read(name, body, Ignored())
            except BodyError as error:
                refused += 1
                check_sentence(error, body)
    assert refused > len(paths)


bodies = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.sampled_from(BODIES), st.data())
def test_any_value_in_any_fields(name: str, data: st.DataObject) -> None:
    fields = sorted(SCHEMAS[name]["properties"])
    body = data.draw(st.dictionaries(st.sampled_from(fields), bodies, min_size=1, max_size=4))
    try:
        Validator(DOCUMENT).read(name, body, Ignored())
    except BodyError as error:
        check_sentence(error, body)


@pytest.mark.parametrize(
    "body",
    [b"", b" \n", b"\xff", b"{", b"nope", b'{"a": 1', b"9" * 5000, b'{"a": %s}' % (b"9" * 5000), b"NaN", b"1e999",
     b"[" * 99, b'{"a": 1, "a": 2}', b"0," * 70_000],
    ids=range(13),
)  # fmt: skip
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(BodyError) as caught:
        parse_json(body)
    check_sentence(caught.value, None)


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("EmbeddingRequest", {"input": ""}, "input must not be empty."),
        ("EmbeddingRequest", {"input": []}, "input must have at least one entry."),
        ("EmbeddingRequest", {"input": [[1, 2]]}, "input[0] must be text, not a list. Send text, not token ids."),
        (
            "CompletionRequest",
            {"prompt": [1, 2, 3]},
            "prompt has 3 entries; at most 1 are allowed. One text at a time, and no token ids.",
        ),
        ("OllamaEmbed", {"input": ["a", ""]}, "input[1] must not be empty."),
        ("EmbeddingRequest", {"input": 5}, "input must be text or a list, not a whole number."),
        ("EmbeddingRequest", {"input": ["x"] * 257}, "input has 257 entries; at most 256 are allowed."),
        ("EmbeddingRequest", {}, "input is missing."),
        ("EmbeddingRequest", {"input": "x", "encoding_format": "hex"}, 'encoding_format must be "float" or "base64".'),
        ("ChatRequest", {"messages": "hi"}, "messages must be a list, not text."),
        ("ChatRequest", {"temperature": "hot"}, "temperature must be a number, not text."),
        ("ChatRequest", {"temperature": 99}, "temperature must be from 0 to 10."),
        (
            "ChatRequest",
            {"messages": [{"content": None, "tool_calls": [{"id": "1"}], "role": "assistant"}]},
            "messages[0].tool_calls: This model cannot call tools. Leave it out.",
        ),
        ("ChatRequest", {"user": "x" * 300}, "user has 300 characters; at most 256 are allowed."),
    ],
)  # fmt: skip
def test_the_words(name: str, body: Any, said: str) -> None:
    with pytest.raises(BodyError) as caught:
        Validator(DOCUMENT).read(name, body, Ignored())
    assert f"{caught.value.message} {caught.value.hint}".strip() == said
