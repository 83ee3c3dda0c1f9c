"""Text that knows where it came from, while a chat template processes it.

`Tracked` is a str with the real characters, so that a template gets the same results as with any str. It also keeps the
source of each character. Characters that an operation does not track have the source UNKNOWN: only characters known to
come from the template itself may ever form a control token.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, Final, SupportsIndex, TypeAlias

# Sources: the template's own text, text of unknown origin, or (0 and up) the number of a message.
OWN: Final = -1
UNKNOWN: Final = -2
# In place of an offset: the characters are no longer the message's own, as after `upper`.
CHANGED: Final = -1

# Length in characters, source, and offset of the first character in the message's content.
Span: TypeAlias = tuple[int, int, int]


class Tracked(str):
    """A text and its spans, whose lengths add up to its own.

    Names that str does not have begin with an underscore: Jinja's sandbox hides them from templates.
    """

    __slots__ = ("_spans",)

    _spans: tuple[Span, ...]

    def __new__(cls, text: str = "", source: int = UNKNOWN, offset: int = CHANGED) -> Tracked:
        return cls._of(text, ((len(text), source, offset),) if text else ())

    @classmethod
    def _of(cls, text: str, spans: tuple[Span, ...]) -> Tracked:
        made = super().__new__(cls, text)
        made._spans = spans
        return made

    def _cut(self, start: int, stop: int) -> Tracked:
        """Return the characters from `start` up to `stop`, exclusive."""
        found: list[Span] = []
        at = 0
        for length, source, offset in self._spans:
            first, last = max(start, at), min(stop, at + length)
            if first < last:
                found.append((last - first, source, offset if offset == CHANGED else offset + first - at))
            at += length
            if at >= stop:
                break
        return self._of(str.__getitem__(self, slice(start, max(start, stop))), tuple(found))

    def _pieces(self) -> Iterator[tuple[str, int, int]]:
        """Yield the text of each span, with its source and offset."""
        at = 0
        for length, source, offset in self._spans:
            yield str.__getitem__(self, slice(at, at + length)), source, offset
            at += length

    def _cut_all(self, texts: Iterable[str], gap: int | None) -> list[Tracked]:
        """Cut out `texts`, which follow each other in this text `gap` characters apart; with None, search for each."""
        parts, at = [], 0
        for text in texts:
            at = str.index(self, text, at) if gap is None else at
            parts.append(self._cut(at, at + len(text)))
            at += len(text) + (gap or 0)
        return parts

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        return (self._cut(at, at + 1) for at in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> Tracked:
        if not isinstance(key, slice):
            at = range(len(self))[operator.index(key)]
            return self._cut(at, at + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self._cut(start, stop)
        return joined(self._cut(at, at + 1) for at in range(start, stop, step))

    def __add__(self, other: str) -> Tracked:
        # Other str subclasses, such as Markup, have their own rules for what precedes them.
        return joined((self, other)) if type(other) in (str, Tracked) else NotImplemented

    def __radd__(self, other: str) -> Tracked:
        return joined((other, self)) if type(other) is str else NotImplemented

    def __mul__(self, count: SupportsIndex) -> Tracked:
        text = str.__mul__(self, count)
        if len(self._spans) == 1 and self._spans[0][2] == CHANGED:
            return Tracked(text, self._spans[0][1])
        return Tracked._of(text, self._spans * max(0, operator.index(count)))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Tracked:
        text = str.__mod__(self, values)
        pieces = str.split(self, "%s")
        given = values if isinstance(values, tuple) else (values,)
        if len(pieces) != len(given) + 1 or any("%" in piece for piece in pieces):
            return Tracked(text)
        own = self._cut_all(pieces, 2)
        return joined([own[0], *(part for pair in zip(map(str, given), own[1:], strict=True) for part in pair)])

    def join(self, texts: Iterable[str], /) -> Tracked:
        items = list(texts)
        str.join(self, items)  # raises whatever str raises
        between = [part for item in items for part in (self, item)]
        return joined(between[1:])

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Tracked:
        text, left = str.replace(self, old, new, count), operator.index(count)
        if not old:
            return _marked(text, self, new)
        parts: list[str] = []
        at = 0
        while left and (found := str.find(self, old, at)) >= 0:
            parts += [self._cut(at, found), new]
            at, left = found + len(old), left - 1
        return joined([*parts, self._cut(at, len(self))])

    def strip(self, chars: str | None = None, /) -> Tracked:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Tracked:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Tracked:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> Tracked:
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> Tracked:
        return self._cut(0, len(str.removesuffix(self, suffix)))

    # Typed as in str, list[str] and tuple[str, str, str]: a list[Tracked] is not a list[str].
    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return [*self._cut_all(str.split(self, sep, maxsplit), None if sep is None else len(sep))]

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return [*self._cut_all(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))]

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._cut_all(str.splitlines(self, True), 0)
        return [line._cut(0, len(text)) for line, text in zip(lines, str.splitlines(self, keepends), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, after = self._cut_all(str.partition(self, sep), 0)
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, after = self._cut_all(str.rpartition(self, sep), 0)
        return before, middle, after


def _changing(name: str) -> Any:
    """Wrap the str method of that name so that its result's characters have a source."""
    plain = getattr(str, name)

    def method(self: Tracked, *args: Any, **kwargs: Any) -> Tracked:
        return _marked(plain(self, *args, **kwargs), self, *args, *kwargs.values())

    method.__name__ = name
    return method


for _name in (
    *("capitalize", "casefold", "center", "expandtabs", "ljust", "lower", "rjust", "swapcase", "title", "translate"),
    *("upper", "zfill"),
):
    setattr(Tracked, _name, _changing(_name))


def _marked(text: str, *inputs: Any) -> Tracked:
    """Return text computed from `inputs` in a way that loses the source of single characters."""
    sources: set[int] = set()
    for item in inputs:
        if isinstance(item, Tracked):
            sources |= {source for _, source, _ in item._spans}
        elif not isinstance(item, int):
            sources.add(UNKNOWN)
    if UNKNOWN in sources or (OWN in sources and len(sources) > 1):
        return Tracked(text)
    return Tracked(text, max(sources, default=OWN))


def joined(pieces: Iterable[str]) -> Tracked:
    """Concatenate texts; the source of a plain str is UNKNOWN."""
    texts = list(pieces)
    spans: list[Span] = []
    for text in texts:
        for span in text._spans if isinstance(text, Tracked) else Tracked(text)._spans:
            if spans and _follows(spans[-1], span):
                spans[-1] = (spans[-1][0] + span[0], *spans[-1][1:])
            else:
                spans.append(span)
    return Tracked._of("".join(texts), tuple(spans))


def _follows(before: Span, span: Span) -> bool:
    (length, source, offset), (_, next_source, next_offset) = before, span
    return source == next_source and next_offset == (CHANGED if offset == CHANGED else offset + length)
