"""README.md of a bundle is published: what strangers' files say stands in it as text."""

from __future__ import annotations

import json
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rkconvert import demo
from rkconvert.output.markdown import argument, plain
from rkruntime.cli import main

GFM = MarkdownIt("gfm-like", {"linkify": False})
MARKUP = "<bos> ![x](http://e/i.png) [y](javascript:z) <script>alert(1)</script> *a* `b` ~~c~~ &lt; a|b # d"


class Page(HTMLParser):
    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(GFM.render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


@given(
    st.text(
        st.sampled_from("_a*é~ [") | st.characters(codec="utf-8", exclude_categories=["Cc", "Cf", "Zl", "Zp"]),
        min_size=1,
    )
)
def test_any_text_is_read_as_it_is(text: str) -> None:
    page = Page(f"word {plain(text)} word")
    assert page.tags == ["p"]
    assert " ".join(page.text.split()) == " ".join(f"word {text} word".split())


@given(st.text(min_size=1))
def test_any_name_is_one_argument(text: str) -> None:
    line = f"rkedge chat {argument(text)}"
    assert "\n" not in line
    assert len(shlex.split(line)) == 3


def test_a_card_has_no_markup_of_others(tmp_path: Path) -> None:
    lora, base = tmp_path / "lora", tmp_path / f"base {MARKUP.replace('/', '')}"
    shutil.copytree(demo.adapter(), lora)
    shutil.copytree(demo.checkpoint(), base)
    settings = json.loads((lora / "adapter_config.json").read_text())
    name = MARKUP.replace("/", "") + "-llama"  # another base: a note
    (lora / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": name}))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": f"X {MARKUP}"}))
    out = tmp_path / "my model"
    assert main(["convert", str(base), "--lora", str(lora), "-o", str(out), "-q"]) == 0
    front, card = (out / "README.md").read_text().split("---\n\n", 1)
    page = Page(card)
    assert not {"script", "img", "em", "s", "bos"} & set(page.tags)
    assert all(address.startswith("https://") for address in page.addresses)
    assert f"names the class X {MARKUP}"[:90] in page.text
    assert name in page.text
    assert "rkedge chat 'my model'" in page.text
    assert "e/i.png" not in front


@pytest.mark.parametrize("text", ["# a", "- a", "1. a", "> a", "    a", "a\n# b", "a\r\n\r\nb", "\u2028# c"])
def test_a_text_stays_in_its_line(text: str) -> None:
    page = Page(f"* {plain(text)}\n* next")
    assert page.tags.count("li") >= 2
    assert "h1" not in page.tags
