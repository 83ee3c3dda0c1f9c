"""JSON of strangers: what Python may write and no file in UTF-8 can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkconvert import demo
from rkconvert.tensors.shards import parse_json
from rkruntime.cli import main

TEXTS = st.text(st.characters(codec=None), max_size=6)  # with surrogates
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def is_utf8(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@given(VALUES)
def test_whatever_is_read_can_be_written(value: Any) -> None:
    try:
        found = parse_json(json.dumps(value).encode())
    except ValueError as error:
        assert "occurs twice" in str(error)  # two keys that become the same
        assert not is_utf8(value)
        return
    assert is_utf8(found)
    if is_utf8(value):
        assert found == value


def test_pairs_stay_what_they_are() -> None:
    assert parse_json(rb'["\ud83d\ude00", "\ud83d", "\\ud800", "\u00e9"]') == ["\U0001f600", "\ufffd", "\\ud800", "é"]


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "_name_or_path"),
        ("config.json", "transformers_version"),
        ("generation_config.json", "transformers_version"),
        ("tokenizer_config.json", "name_or_path"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "merge"])
def test_a_folder_whose_name_was_not_utf8(tmp_path: Path, command: str, file: str, key: str) -> None:
    """transformers writes the name of the folder that it read: bytes that are not UTF-8 as surrogates."""
    base = tmp_path / "base"
    base.mkdir()
    for path in demo.checkpoint().iterdir():
        (base / path.name).symlink_to(path)
    content = json.loads((base / file).read_text()) | {key: "/home/caf\udce9"}
    (base / file).unlink()
    (base / file).write_text(json.dumps(content))
    line = [command, str(base), "--lora", str(demo.adapter()), "-o", str(tmp_path / "out"), "-q"]
    assert main(line) == 0


def test_a_page_of_an_unknown_model_type(tmp_path: Path) -> None:
    content = json.loads((demo.checkpoint() / "config.json").read_text())
    del content["architectures"]
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "x\ud800"}))
    for line in (["plan", "--html"], ["compat", "--no-emulator", "--html"]):
        page = tmp_path / f"{line[0]}.html"
        assert main([line[0], str(tmp_path / "config.json"), *line[1:], str(page)]) == 0
        assert "x\ufffd" in page.read_text("utf-8")


def test_what_a_template_makes_of_it(tmp_path: Path) -> None:
    for path in demo.checkpoint().iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        r"{{ bos_token }}{% for m in messages %}{{ m.role ~ '\ud800' }}{{ m.content }}{% endfor %}"
    )
    assert main(["convert", str(tmp_path), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert main(["run", str(tmp_path / "out"), "-p", "Who are you?", "--max-new-tokens", "2"]) == 0
