"""Markdown as the page gets it: what the library reads, in few elements, whatever a model says."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rkruntime.serve.page.markdown import blocks

MOST = 16384
BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "hr"}
ELEMENTS = BLOCKS | {"code", "em", "strong", "s", "a", "br", "table", "thead", "tbody", "tr", "th", "td"}
VOID = {"br", "hr"}
# Pieces of which Markdown is made, and which lead astray.
PIECES = st.sampled_from(
    ["a", "b ", " ", "\n", "\n\n", "*", "**", "_", "~~", "`", "```", "```py\n", "~~~", "# ", "## ", "- ", "1. ", "2) ",
     "> ", "    ", "\t", "| ", "|-|-|\n", "a|b\n", "---\n", "===\n", "[", "]", "(", ")", "](", "![", "<", ">", "<b>",
     "</b>", "https://a.b", "<https://a.b/c>", "javascript:x", "data:image/png,", "mailto:a@b.c", "\\", "&lt;", "&",
     "&#x202e;", "\u202e", "\u2066", "\0", "\x1b[31m", "\r", "\r\n", "\u2028", "é", "😀", "\ud800", '"', "[a]: /b\n"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=40).map("".join)


def as_html(node: Any) -> str:
    """The tree as the library writes HTML, to be compared with what that writes."""
    if isinstance(node, str):
        return html.escape(node).replace("&#x27;", "'")
    tag, attributes, *children = node
    shown = ""
    for name, value in attributes.items():
        if name != "language":
            shown += f' {name}="{html.escape(str(value))}"'.replace(' align="', ' style="text-align:')
    end = "" if tag in VOID else f"</{tag}>"
    return f"<{tag}{shown}>{''.join(map(as_html, children))}{end}"


def plain(text: str) -> str:
    """HTML without a code block's language, and without white space, which the library puts between elements."""
    return "".join(re.sub(' class="language-[^"]*"', "", text.replace(" />", ">")).split())


def walk(node: Any, depth: int = 1) -> Any:
    yield node, depth
    if isinstance(node, list):
        for child in node[2:]:
            yield from walk(child, depth + 1)


def check(text: str) -> None:
    found = blocks(text)
    lines = [block["line"] for block in found]
    assert lines == sorted(set(lines))
    size = len(json.dumps(found))
    assert size < 120 * len(text) + 400_000
    for block in found:
        for node, depth in walk(block["node"]):
            assert depth < 40
            if isinstance(node, str):
                continue
            tag, attributes, *_ = node
            assert tag in ELEMENTS
            assert attributes.keys() <= {"href", "start", "align", "language"}
            assert attributes.get("href", "http://x").lower().startswith(("http://", "https://", "mailto:"))
            assert attributes.get("align", "left") in ("left", "center", "right")


@given(TEXTS)
@settings(max_examples=300)
def test_it_is_what_the_library_reads(text: str) -> None:
    """The library's own HTML is the oracle, but for links and images, which it allows more of."""
    check(text)
    if any(word in text for word in ("](", "<http", "mailto:", "<java", "<data")) or text.count("*") > 30:
        return
    library = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    library.disable(["reference", "html_block", "html_inline"])
    made = "".join(as_html(block["node"]) for block in blocks(text))
    assert plain(made) == plain(library.render(text))


@given(TEXTS)
@settings(max_examples=300)
def test_only_the_last_block_can_change(text: str) -> None:
    """So the page has each block read once more only until the next one begins."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    whole = blocks(text)
    for at, block in enumerate(whole):
        rest = blocks("\n".join(lines[block["line"] :]))
        assert [item["node"] for item in rest] == [item["node"] for item in whole[at:]]
    for cut in range(len(lines)):
        part = blocks("\n".join(lines[:cut]))
        assert part[:-1] == whole[: max(0, len(part) - 1)]


N = MOST
HOSTILE = {
    "brackets": "[" * N,
    "brackets within brackets": "[" * (N // 2) + "]" * (N // 2),
    "links that never end": "[a](" * (N // 4),
    "images within images": "![[]()" * (N // 6),
    "stars": "*a " * (N // 3),
    "stars and underscores": "*_" * (N // 2 - 1) + "a",
    "strong within strong": "**" * (N // 4 - 1) + "a" + "**" * (N // 4 - 1),
    "struck within struck": "~~a" * (N // 3),
    "quotes": ">" * N,
    "lists within lists": "".join("  " * at + "* a\n" for at in range(120)),
    "lists on one line": "- " * (N // 2),
    "ticks of each length": "".join("e" + "`" * at for at in range(170)),
    "an unfinished fence": "```\n" + "x\n" * (N // 2 - 2),
    "entities": "&amp;" * (N // 5),
    "a wide table with short rows": "|" + "a|" * 500 + "\n|" + "-|" * 500 + "\n" + "|a\n" * 4700,
    "a long table": "|a|b|\n|-|-|\n" + "|x|y|\n" * (N // 6 - 3),
    "underlines": "a\n=" * (N // 3),
    "references": "".join(f"[{at}]: /u\n" for at in range(N // 12)),
    "definitions that never end": "[a\n" * (N // 3),
    "titles": '[a](b "' * (N // 7),
    "lazy quotes": ">a\n" + "a\n" * (N // 2 - 2),
    "one that reverses": "\u202e" * N,
    "control characters": "\x01\x1b\x9b" * (N // 3),
    "half characters": "\ud800" * N,
    "spaces": " " * N,
    "lines": "\n" * N,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_stays_small(name: str) -> None:
    assert len(HOSTILE[name]) <= MOST
    check(HOSTILE[name])


def test_text_that_is_too_deep_is_not_lost() -> None:
    deep = blocks("*" * 4000 + "word" + "*" * 4000)
    assert "word" in "".join(node for node, _ in walk(deep[0]["node"]) if isinstance(node, str))


@pytest.mark.parametrize(
    "text",
    [
        "[a](javascript:alert(1))", "[a](JaVaScRiPt:alert(1))", "[a](java\tscript:alert(1))", "[a](&#106;avascript:x)",
        "[a](data:text/html,x)", "[a](data:image/png;base64,AAAA)", "[a](vbscript:x)", "[a](file:///etc/passwd)",
        "[a](//evil.example)", "[a](/sessions/diary)", "[a](#chat=x)", "[a](blob:x)", "<javascript:x>", "<data:x>",
        "![a](data:image/png;base64,AAAA)", "![a](/x.png)", "[a]: javascript:x\n\n[a]", "[a](http:///x)", "[a](http:x)",
        "[a]()", "![a]()", "[a](<>)",
    ],
)  # fmt: skip
def test_what_is_no_address_on_the_web_is_no_link(text: str) -> None:
    assert all(node[0] != "a" for block in blocks(text) for node, _ in walk(block["node"]) if isinstance(node, list))


def test_the_language_of_code_is_a_word() -> None:
    infos = {"py": "py", " c++ x": "c++", "objective-c": "objective-c", "*": None, '"><b>': None, "é": None}
    for info, language in infos.items():
        (block,) = blocks(f"~~~{info}\nx\n~~~")
        assert block["node"] == ["pre", {"language": language} if language else {}, ["code", {}, "x\n"]]


def test_images_are_links() -> None:
    assert blocks("![a *cat*](http://e.x/c.png)") == [
        {"line": 0, "node": ["p", {}, ["a", {"href": "http://e.x/c.png"}, "a *cat*"]]}
    ]


def test_html_is_text(daemon: Any) -> None:
    status, _, found = daemon.request("POST", "/markdown", {"text": "<b onclick=x>a</b>\n\n<script>\nx\n</script>"})
    assert status == 200
    assert [block["node"][2] for block in found["blocks"]] == ["<b onclick=x>a</b>", "<script>"]


def test_a_text_that_is_too_long_is_refused(daemon: Any) -> None:
    assert daemon.request("POST", "/markdown", {"text": "a" * MOST})[0] == 200
    assert daemon.request("POST", "/markdown", {"text": "a" * (MOST + 1)})[0] == 400
    assert daemon.request("POST", "/markdown", {"text": "\ud800"})[2]["blocks"][0]["node"] == ["p", {}, "\ud800"]
