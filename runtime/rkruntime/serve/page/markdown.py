"""Parse Markdown to a tree of a few known elements, which the page builds one by one: no HTML is made here or there.

A model's text may be hostile. The time it takes and the result's size and depth are bounded by its length, which the
schema limits; nothing in the result loads anything; a link leads to the web or a mail address, and only when followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

# A text, or an element as a list of its name, its attributes and its children.
Node = str | list[Any]

# Elements nested deeper are left out, but their text is kept: `*` can nest them by the thousand, which neither JSON nor
# a browser's layout can handle.
_MAX_DEPTH: Final = 32
# Short rows of a table are filled up to the length of the first, so that few characters can make very many cells.
_MAX_CELLS: Final = 1 << 12
_LANGUAGE: Final = re.compile(r"\s*([A-Za-z0-9+#._-]{1,24})")
_ADDRESS: Final = re.compile(r"(https?://|mailto:)[^/]", re.IGNORECASE)


class _Parser(MarkdownIt):
    """CommonMark with tables and strikethrough, without HTML, and with a line break for each line break in the text.

    Also without reference definitions, so that no block depends on another, and each can be parsed as it arrives.
    """

    def __init__(self, *, tables: bool) -> None:
        super().__init__("commonmark", {"html": False, "breaks": True})
        self.enable(["table", "strikethrough"] if tables else ["strikethrough"])
        self.disable(["reference", "html_block", "html_inline"])

    def validateLink(self, url: str) -> bool:  # noqa: N802 - the library's name
        """Whether a URL may become a link; otherwise the text stays as it was typed."""
        return _is_address(url)


def _is_address(url: Any) -> bool:
    return _ADDRESS.match(str(url)) is not None


@cache
def _parser(*, tables: bool) -> _Parser:
    return _Parser(tables=tables)


def blocks(text: str) -> list[dict[str, Any]]:
    """Return the blocks of a text, each with the number of the line in which it begins and its `Node`.

    Only the last block can change when the text goes on.
    """
    lines = text.splitlines()
    tables = len(lines) * max((line.count("|") for line in lines), default=0) <= _MAX_CELLS
    tree: list[Any] = []
    begins: list[int] = []
    stack = [tree]
    for token in _parser(tables=tables).parse(text):
        if len(stack) == 1 and token.map:
            begins.append(token.map[0])
        _add(token, stack)
    return [{"line": line, "node": node} for line, node in zip(begins, tree, strict=True)]


def _add(token: Token, stack: list[list[Any]]) -> None:
    """Add a token's node to the innermost open element, which is the last one in `stack`."""
    inside = stack[-1]
    if token.nesting > 0:
        if token.hidden or len(stack) > _MAX_DEPTH or (token.tag == "a" and not _is_address(token.attrs["href"])):
            stack.append(inside)
        else:
            inside.append([token.tag, _attributes(token)])
            stack.append(inside[-1])
    elif token.nesting < 0:
        stack.pop()
    elif token.type == "inline":
        for child in token.children or ():
            _add(child, stack)
    else:
        inside.append(_LEAVES[token.type](token))


def _attributes(token: Token) -> dict[str, Any]:
    if token.tag == "a":
        return {"href": token.attrs["href"]}
    if token.tag == "ol" and "start" in token.attrs:
        return {"start": token.attrs["start"]}
    if align := re.fullmatch("text-align:(left|center|right)", str(token.attrs.get("style"))):
        return {"align": align[1]}
    return {}


def _code_block(token: Token) -> Node:
    language = _LANGUAGE.match(token.info)
    return ["pre", {"language": language[1]} if language else {}, ["code", {}, token.content]]


def _image(token: Token) -> Node:
    """Return a link in place of an image, which would be loaded and so tell its server that somebody reads this."""
    shown, source = token.content or "image", token.attrs["src"]
    return ["a", {"href": source}, shown] if _is_address(source) else shown


_LEAVES: Final[Mapping[str, Callable[[Token], Node]]] = {
    "text": lambda token: token.content,
    "code_inline": lambda token: ["code", {}, token.content],
    "softbreak": lambda _: ["br", {}],
    "hardbreak": lambda _: ["br", {}],
    "hr": lambda _: ["hr", {}],
    "fence": _code_block,
    "code_block": _code_block,
    "image": _image,
}
