"""Signatures, which are texts with gaps that programs print, and the log that is searched for them.

Everything here takes at most linear time in the length of a log, whatever the log contains.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Final

from rkruntime.checks import logtext

_GAP: Final = 160
_SPAN: Final = 240
"""Characters around the first text of `a & b` in which the others must be."""
_MOST_HITS: Final = 3
MOST_LINES: Final = 8
WIDEST_LINE: Final = 300
"""Most characters of a line, and most lines, that are shown."""
_FEWEST_ANCHOR: Final = 3
_FEWEST_CUT: Final = 14

_QUOTES = str.maketrans(
    {
        **dict.fromkeys('"`´‘’‚“”„«»「」', "'"),
        "：": ":",
        "，": ",",
        "（": "(",
        "）": ")",
        "！": "!",
        "\u00a0": " ",
        "\\": "",
    }
)
_TOKEN = re.compile(r"\{[^{}]*\}|\*|\$$")
_WORD = re.compile(r"[^\s{*$]*")
_DIGIT = re.compile(r"\d")
_ALIKE = str.maketrans(dict.fromkeys("123456789", "0"))
_CHOICE = re.compile(r"\{([^{}|]+\|[^{}]+)\}")
_CLASSES = {
    "{n}": r"(-?(?:0x[0-9a-f]{1,16}|\d{1,20}))",
    "{w}": r"[\w.+/-]{1,80}",
    "{v}": r"v?(\d{1,4}(?:\.\d{1,6}){1,3}(?:b\d{1,3})?)",
    # A character, or a few, repeated endlessly; not beginning with the dashes and bars that programs draw with.
    "{same}": r"(?:([^\s\-=*#_.~+|>─━═█▏▎▍▌▋▊▉])\1{23,200}|([^\s\-=*#_.~+|>─━═█▏▎▍▌▋▊▉]\S{1,3})\2{11,200})",
}


def simplified(text: str) -> str:
    """Normalize text for comparison: lower case, one kind of quote, single spaces."""
    return " ".join(text.translate(_QUOTES).lower().split())


class Signature:
    """A text that programs print, with gaps, as data/diagnosis.yaml writes it.

    `{n}` is a number, `{v}` a version, `{w}` a word or path, `{same}` one character 24 times or more, `{a|b}` one of
    these, `{fail}` one of `words["fail"]`, `*` anything on the line, a final `$` the end of the line; `a & b & c` are
    texts that occur on one line in any order.
    """

    def __init__(self, source: str, words: Mapping[str, Sequence[str]] | None = None) -> None:
        self.source = source
        first, *rest = (_expanded(part, words or {}) for part in source.split(" & "))
        self.plain = first
        self._rest = rest
        # A log that has none of one of these cannot contain the signature.
        self._anchors = [anchors for anchors in map(_anchors, (first, *rest)) if all(anchors)]
        shortest = min(_anchors(first), key=len)
        if not rest and len(shortest) < _FEWEST_ANCHOR and not re.search(r"[\u4e00-\u9fff]", shortest):
            raise ValueError(f"The signature {source!r} needs a fixed text of at least {_FEWEST_ANCHOR} characters.")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The signature's first text as a regular expression; compiled only once a log contains the anchors."""
        return _compiled(self.plain)

    @cached_property
    def _others(self) -> list[re.Pattern[str]]:
        return [_compiled(part) for part in self._rest]

    def possible(self, log: Log) -> bool:
        """Whether the log contains every fixed text of the signature."""
        return all(any(map(log.may_have, anchors)) for anchors in self._anchors)

    def matches(self, log: Log) -> Iterator[int]:
        """Yield positions of the signature in `log.text`, at most three."""
        if self.possible(log):
            yield from islice(self._on_one_line(log.text) if self._rest else starts(self.pattern, log.text), _MOST_HITS)

    def _on_one_line(self, text: str) -> Iterator[int]:
        # Find the other texts first: a line may have the first text a million times, and each time would cost a search.
        others = [(other, list(starts(other, text))) for other in self._others]
        if not all(places for _, places in others):
            return
        for match in self.pattern.finditer(text):
            start = max(text.rfind("\n", 0, match.start()) + 1, match.start() - _SPAN)
            end = text.find("\n", match.end(), match.end() + _SPAN)
            end = match.end() + _SPAN if end < 0 else end
            if all(_any_between(places, start, end) and other.search(text[start:end]) for other, places in others):
                yield match.start()

    def sure(self, place: int, log: Log) -> bool:
        """Whether the texts of `a & b` and `a*b` are on one line of the log, not on lines joined on suspicion."""
        loose = self._rest or "*" in self.plain
        return not loose or bool(log.numbers((place,)))

    def cut_off(self, log: Log) -> int | None:
        """Return the position of this text if the log's first or last line cuts it off, else None."""
        if self._rest or _TOKEN.search(self.plain) or len(self.plain) < _FEWEST_CUT:
            return None
        fewest = max(_FEWEST_CUT, len(self.plain) * 2 // 3)
        if self.plain[:fewest] not in log.last and self.plain[-fewest:] not in log.first:
            return None
        for size in range(len(self.plain) - 1, fewest - 1, -1):
            # Half a number is a different number.
            if not self.plain[size - 1].isdigit() and log.last.endswith(self.plain[:size]):
                return log.last_start
            if not self.plain[-size].isdigit() and log.first.startswith(self.plain[-size:]):
                return 0
        return None


def _any_between(places: Sequence[int], start: int, end: int) -> bool:
    """Whether one of the sorted places is from `start` up to `end`, exclusive."""
    at = bisect_left(places, start)
    return at < len(places) and places[at] < end


def starts(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    """Return the positions where the pattern matches."""
    return (match.start() for match in pattern.finditer(text))


def _expanded(part: str, words: Mapping[str, Sequence[str]]) -> str:
    """Return a part of a signature with the word lists it names, such as `{fail}`, spelled out."""
    return re.sub(
        r"\{(\w+)\}",
        lambda match: "{" + "|".join(map(simplified, words[match[1]])) + "}" if match[1] in words else match[0],
        simplified(part),
    )


def _anchors(plain: str) -> tuple[str, ...]:
    """The longest fixed text; if there is hardly one, the texts of which one must be there."""
    longest = max(_TOKEN.split(plain), key=len).strip()
    choice = _CHOICE.search(plain)
    if len(longest) >= _FEWEST_ANCHOR or choice is None:
        return (longest,)
    return tuple(text.strip() for text in choice[1].split("|"))


def _compiled(plain: str) -> re.Pattern[str]:
    word = _WORD.match(plain)[0]  # type: ignore[index]  # an empty one at least
    # What may not be before the first word is looked for behind it: for one that begins with a word, re searches fast.
    parts, at = [re.escape(word), _left_edge(word)], len(word)
    for token in _TOKEN.finditer(plain, at):
        parts += [_literal(plain[at : token.start()]), _gap(token.group())]
        at = token.end()
    return re.compile("".join((*parts, _literal(plain[at:]), _right_edge(plain))))


def _literal(text: str) -> str:
    return re.escape(text).replace(r"\ ", r"[ \n]")


def _gap(mark: str) -> str:
    if mark == "*":
        return rf"[^\n]{{0,{_GAP}}}?"
    if mark == "$":
        return r"[ .!]{0,3}(?=\n|\Z)"
    if mark in _CLASSES:
        return _CLASSES[mark]
    return "(?:" + "|".join(map(_literal, mark[1:-1].split("|"))) + ")"


def _left_edge(word: str) -> str:
    """Return a pattern by which a word or number must begin with the signature: `skilled` does not have `killed`."""
    before = {"a": "[a-z]", "0": r"[\d.]"}.get(_kind(word[:1]))
    return f"(?<!{before}{re.escape(word)})" if before else ""


def _right_edge(plain: str) -> str:
    """Return a pattern by which a number must end there; a word need not, as in the runtime's `run failedrobot:`."""
    return r"(?![\dx])" if _kind(plain[-1:]) == "0" else ""


def _kind(character: str) -> str:
    return "0" if character.isdecimal() else "a" if "a" <= character <= "z" else ""


def _distinct(lines: Sequence[str]) -> str:
    """Return the lines as one text, without lines that differ in digits only from earlier ones with such a next line.

    Every text without digits that spans at most two lines of the log is in the result.
    """
    keys = "\n".join(lines).translate(_ALIKE).split("\n")
    pairs = dict(zip(zip(keys, [*keys[1:], ""], strict=True), range(len(keys)), strict=True))
    kept = sorted(pairs.values())
    parts: list[str] = []
    for number, following in zip(kept, [*kept[1:], -1], strict=True):
        parts += lines[number : number + 1] if following == number + 1 else [*lines[number : number + 2], "\n"]
    return " ".join(parts)


class Log:
    """A log's lines, and the normalized text that is searched for signatures."""

    def __init__(self, lines: Sequence[str], context: Mapping[str, str]) -> None:
        self.lines = lines
        self._line_of: list[int] = []
        self._starts: list[int] = []
        plain: list[str] = []
        length = 0
        # The context's facts are searched like lines of the log, but never shown.
        extra = [(len(lines), f"{key}: {value}") for key, value in context.items()]
        whole = list(logtext.unwrapped(lines))
        for number, line in (*enumerate(lines), *whole, *extra):
            plain.append(simplified(line))
            self._starts.append(length)
            self._line_of.append(number)
            length += len(plain[-1]) + 1
        self.text = "\n".join(plain)
        # The range of the joined lines in `text`; the halves of a joined line may have nothing to do with each other.
        starts = [*self._starts, length]
        self.joined = (starts[len(lines)], starts[len(lines) + len(whole)])
        self._flat = self.text.replace("\n", " ")
        self._distinct = _distinct(plain)
        self.first, self.last = (plain[0], plain[len(lines) - 1]) if lines else ("", "")
        self.last_start = self._starts[len(lines) - 1] if lines else 0

    def may_have(self, anchor: str) -> bool:
        """Whether the text, with its line breaks read as spaces, contains `anchor`."""
        return anchor in (self._flat if _DIGIT.search(anchor) else self._distinct)

    def number_at(self, position: int) -> int:
        """Return the index of the log line at a position of `text`; the number of lines for a line of the context."""
        return self._line_of[bisect_right(self._starts, position) - 1]

    def numbers(self, positions: Iterable[int]) -> set[int]:
        """Return the indexes of the lines at these positions, leaving out lines joined on suspicion."""
        return {self.number_at(place) for place in positions if not self.joined[0] <= place < self.joined[1]}

    def shown(self, positions: Iterable[int]) -> tuple[str, ...]:
        """Return the log's lines at these positions, without repeats and without the context's lines."""
        numbers = [number for number in map(self.number_at, positions) if number < len(self.lines)]
        return tuple(dict.fromkeys(self.lines[number][:WIDEST_LINE] for number in numbers))[:MOST_LINES]
