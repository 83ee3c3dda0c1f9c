"""What a log of RKLLM, RKNN, the NPU's kernel driver or rkllm-toolkit says went wrong.

The knowledge is a table, data/diagnosis.yaml; docs/diagnose.md says how to read and to extend it. Nothing here runs in
more than linear time in the length of a log, whatever the log holds.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

from rkruntime import logtext, resources
from rkruntime.conditions import fits

UNEXPLAINED: Final = "unexplained"
NONE: Final = "none"
CONFIDENCES: Final = ("high", "medium", "low")
"""From best to worst.

high: the text names this fault, and no report with another cause is known.
medium: the text goes with this fault in most reports; `others` and the next steps name what else it can be.
low: a hint only, for a log that says nothing better.
A log without any known text is `unexplained` with the confidence `none`.
"""

_GAP: Final = 160
_MOST_HITS: Final = 3
_MOST_LINES: Final = 8
_WIDEST_LINE: Final = 300
_FEWEST_ANCHOR: Final = 3

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
_CLASSES = {
    "{n}": r"(-?(?:0x[0-9a-f]{1,16}|\d{1,20}))",
    "{w}": r"[\w.+/-]{1,80}",
    "{v}": r"v?(\d{1,4}(?:\.\d{1,6}){1,3}(?:b\d{1,3})?)",
}
_TROUBLE = re.compile(
    r"error|fail|fatal|abort|traceback|exception|cannot|invalid|denied|^e |错误|失败|无法", re.IGNORECASE
)


@dataclass(frozen=True)
class Diagnosis:
    """What a log says.

    Attributes:
        class_: the row of the taxonomy, or `unexplained`.
        confidence: `high`, `medium`, `low` or `none`; see `CONFIDENCES`.
        title: the class in a few plain words.
        cause: what it means, and what is not confirmed about it.
        next_steps: what to do, the first thing first.
        evidence: sources, each with who confirmed it.
        lines: the log's lines that led there; for `unexplained` those that look like trouble.
        others: further classes whose texts are in the log, best first.
    """

    class_: str
    confidence: str
    title: str
    cause: str
    next_steps: tuple[str, ...]
    evidence: tuple[str, ...]
    lines: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def explained(self) -> bool:
        """Whether any rule hit."""
        return self.class_ != UNEXPLAINED

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as `rkedge diagnose --json` prints it and errors carry it."""
        return {
            "class": self.class_,
            "confidence": self.confidence,
            "title": self.title,
            "cause": self.cause,
            "next_steps": list(self.next_steps),
            "evidence": list(self.evidence),
            "lines": list(self.lines),
            "others": list(self.others),
        }


def _plain(text: str) -> str:
    """Text as signatures are compared: lower case, one kind of quote, single blanks."""
    return " ".join(text.translate(_QUOTES).lower().split())


class Signature:
    """A text that programs print, with gaps, as data/diagnosis.yaml writes it.

    `{n}` is a number, `{v}` a version, `{w}` a word or path, `{a|b}` one of these, `*` anything on the line,
    and a final `$` the end of the line.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.plain = _plain(source)
        self.anchor = max(_TOKEN.split(self.plain), key=len).strip()
        if len(self.anchor) < _FEWEST_ANCHOR and not re.search(r"[\u4e00-\u9fff]", self.anchor):
            raise ValueError(f"The signature {source!r} has no fixed text of {_FEWEST_ANCHOR} characters.")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The signature as an expression; compiled only for a log that holds the anchor."""
        parts, at = [_left_edge(self.plain)], 0
        for token in _TOKEN.finditer(self.plain):
            parts += [_literal(self.plain[at : token.start()]), _gap(token.group())]
            at = token.end()
        return re.compile("".join((*parts, _literal(self.plain[at:]), _right_edge(self.plain))))

    def matches(self, log: Log) -> Iterator[re.Match[str]]:
        """At most three places in the log."""
        if self.anchor in log.flat:
            for _, match in zip(range(_MOST_HITS), self.pattern.finditer(log.text), strict=False):
                yield match


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


def _left_edge(plain: str) -> str:
    """Words and numbers begin where the signature begins: `killed` is not in `skilled`, nor `12` in `112`."""
    return {"a": r"(?<![a-z])", "0": r"(?<![\d.])"}.get(_kind(plain[:1]), "")


def _right_edge(plain: str) -> str:
    """A number ends; a word need not: the runtime glues the next text to it (`run failedrobot:`)."""
    return r"(?![\dx])" if _kind(plain[-1:]) == "0" else ""


def _kind(character: str) -> str:
    return "0" if character.isdecimal() else "a" if "a" <= character <= "z" else ""


class Log:
    """A log's lines, and the text in which signatures are looked for."""

    def __init__(self, lines: Sequence[str], context: Mapping[str, str]) -> None:
        self.lines = lines
        self._line_of: list[int] = []
        self._starts: list[int] = []
        plain: list[str] = []
        length = 0
        # The context's facts are lines like any other, but never shown.
        extra = [(len(lines), f"{key}: {value}") for key, value in context.items()]
        for number, line in (*enumerate(lines), *logtext.unwrapped(lines), *extra):
            plain.append(_plain(line))
            self._starts.append(length)
            self._line_of.append(number)
            length += len(plain[-1]) + 1
        self.text = "\n".join(plain)
        self.flat = self.text.replace("\n", " ")

    def line_at(self, position: int) -> str | None:
        """The log's line at a position of `text`; None for the context's."""
        number = self._line_of[bisect_right(self._starts, position) - 1]
        return self.lines[number] if number < len(self.lines) else None


@dataclass(frozen=True)
class Rule:
    """When a class is named: each group has a signature in the log, none of `none` is there, the facts fit."""

    class_: str
    confidence: str
    all: tuple[tuple[Signature, ...], ...]
    none: tuple[Signature, ...]
    where: Mapping[str, str]
    cause: str
    next_steps: tuple[str, ...]
    evidence: tuple[str, ...]

    def hit(self, log: Log, facts: Mapping[str, str]) -> tuple[str, ...] | None:
        """The matching lines, or None."""
        if not fits(facts, self.where):
            return None
        found: list[str] = []
        for group in self.all:
            places = [place for signature in group for place in signature.matches(log)]
            if not places:
                return None
            places.sort(key=lambda place: place.start())
            found += [line[:_WIDEST_LINE] for place in places if (line := log.line_at(place.start())) is not None]
        if any(True for signature in self.none for _ in signature.matches(log)):
            return None
        return tuple(dict.fromkeys(found))[:_MOST_LINES]


@dataclass(frozen=True)
class ClassText:
    """What a class of failures means to a person."""

    title: str
    cause: str
    next_steps: tuple[str, ...]
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The rules in their order, the classes' texts, and where facts such as versions stand in a log."""

    rules: tuple[Rule, ...]
    classes: Mapping[str, ClassText]
    facts: Mapping[str, tuple[Signature, ...]]


@cache
def table() -> Table:
    """The table of data/diagnosis.yaml; read once."""
    data = resources.table("diagnosis")
    cite = _Citations(data["marks"], data["repositories"], data["sources"])
    classes = {
        name: ClassText(entry["title"], _flow(entry["cause"]), _steps(entry), cite(entry.get("evidence", {})))
        for name, entry in data["classes"].items()
    }
    rules = [
        Rule(
            class_=entry["class"],
            confidence=entry["confidence"],
            all=tuple(_group(group) for group in entry.get("all", [entry.get("any")])),
            none=_group(entry.get("none", [])),
            where=entry.get("where", {}),
            cause=_flow(entry.get("cause", "")),
            next_steps=_steps(entry),
            evidence=cite(entry.get("evidence", {})),
        )
        for entry in data["rules"]
    ]
    rules.sort(key=lambda rule: CONFIDENCES.index(rule.confidence))
    return Table(tuple(rules), classes, {name: _group(texts) for name, texts in data["facts"].items()})


def _group(texts: str | list[Any]) -> tuple[Signature, ...]:
    """The signatures of a text, a list, or a list with lists (YAML aliases) in it."""
    if isinstance(texts, str):
        return (Signature(texts),)
    return tuple(signature for text in texts for signature in _group(text))


def _flow(text: str) -> str:
    return " ".join(text.split())


def _steps(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_flow(step) for step in entry.get("next_steps", ()))


class _Citations:
    """`rknn-llm#62: reporter` as an address and what it is worth."""

    def __init__(self, marks: Mapping[str, str], repositories: Mapping[str, str], sources: Mapping[str, str]) -> None:
        self._marks, self._repositories, self._sources = marks, repositories, sources

    def __call__(self, evidence: Mapping[str, str]) -> tuple[str, ...]:
        """Citations, the best confirmed first (the order of `marks`)."""
        ranks = list(self._marks)
        best_first = sorted(evidence.items(), key=lambda item: ranks.index(item[1]))
        return tuple(f"{self._place(key)} ({self._marks[mark]})" for key, mark in best_first)

    def _place(self, key: str) -> str:
        name, number, issue = key.partition("#")
        return f"https://github.com/{self._repositories[name]}/issues/{issue}" if number else self._sources[name]


def diagnose(text: str | Iterable[str], *, context: Mapping[str, object] | None = None) -> Diagnosis:
    """Explain a log.

    Args:
        text: the log as one text, or its lines; of a very long one the head and the tail are read.
        context: what the caller knows and the log need not say, such as `{"stage": "load", "signal": "SIGSEGV",
            "driver": "0.9.6", "runtime": "1.2.3"}`. Values of None are ignored.
    """
    whole = text if isinstance(text, str) else "\n".join(text)
    known = {key: str(value) for key, value in (context or {}).items() if value is not None}
    log = Log(logtext.clean_lines(logtext.shorten(whole)), known)
    rows = table()
    facts = _facts(log, rows) | known
    hits: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    for rule in rows.rules:
        if rule.class_ not in hits and (lines := rule.hit(log, facts)) is not None:
            hits[rule.class_] = (rule, lines)
    if not hits:
        return _unexplained(log, rows)
    (best, lines), *rest = hits.values()
    words = rows.classes[best.class_]
    return Diagnosis(
        class_=best.class_,
        confidence=best.confidence,
        title=words.title,
        cause=best.cause or words.cause,
        next_steps=best.next_steps or words.next_steps,
        evidence=tuple(dict.fromkeys((*best.evidence, *words.evidence))),
        lines=lines,
        others=tuple(rule.class_ for rule, _ in rest if rule.confidence != "low" or best.confidence == "low"),
    )


def _facts(log: Log, rows: Table) -> dict[str, str]:
    """The last value of each fact in the log."""
    facts: dict[str, str] = {}
    for name, signatures in rows.facts.items():
        if not any(signature.anchor in log.flat for signature in signatures):
            continue
        found = [match for signature in signatures for match in signature.pattern.finditer(log.text)]
        if found:
            facts[name] = str(max(found, key=lambda match: match.start()).groups()[-1])
    return facts


def _unexplained(log: Log, rows: Table) -> Diagnosis:
    words = rows.classes[UNEXPLAINED]
    trouble = [line[:_WIDEST_LINE] for line in log.lines if _TROUBLE.search(line)]
    return Diagnosis(
        class_=UNEXPLAINED,
        confidence=NONE,
        title=words.title,
        cause=words.cause,
        next_steps=words.next_steps,
        evidence=words.evidence,
        lines=tuple(dict.fromkeys(trouble))[-_MOST_LINES:],
    )
