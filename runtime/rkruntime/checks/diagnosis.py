"""What a log of RKLLM, RKNN, the NPU's kernel driver or rkllm-toolkit says went wrong.

The knowledge is a table, data/diagnosis.yaml; docs/diagnose.md says how to read and to extend it. Nothing here runs in
more than linear time in the length of a log, whatever the log holds.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from typing import Any, Final

from rkruntime import resources
from rkruntime.checks import logtext
from rkruntime.checks.conditions import fits

UNEXPLAINED: Final = "unexplained"
FOREIGN: Final = "not-rkllm"
NONE: Final = "none"
CONFIDENCES: Final = ("high", "medium", "low")
"""From best to worst.

high: the text names this fault, and no report with another cause is known.
medium: the text goes with this fault in most reports; `others` and the next steps name what else it can be.
low: a hint only, for a log that says nothing better.
A text that other programs print, too, counts in full on a line of RKLLM, and one step less near one.
A log without any known text is `unexplained`, one that has nothing of RKLLM in it `not-rkllm`, both with the
confidence `none`.
"""

_GAP: Final = 160
_SPAN: Final = 240
"""Characters around the first text of `a & b` in which the others stand."""
_MOST_HITS: Final = 3
_MOST_LINES: Final = 8
_WIDEST_LINE: Final = 300
_FEWEST_ANCHOR: Final = 3
_FEWEST_CUT: Final = 14
_NEAR: Final = 10
"""Lines within which a line of RKLLM tells that a text which others print, too, belongs to it."""
_SHORT: Final = 40
"""Lines of a log that is about one thing: its lines are all near each other."""
_LONG_FOREIGN: Final = 4
"""Lines after which a log without a single line of RKLLM is not one of it, whatever else it says."""

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
    # One character for ever; not the dashes and bars that programs draw with.
    "{same}": r"([^\s\-=*#_.~+|>─━═█▏▎▍▌▋▊▉])\1{23,200}",
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
        rules_out: what versions and healthy lines exclude, where no failure was found.
    """

    class_: str
    confidence: str
    title: str
    cause: str
    next_steps: tuple[str, ...]
    evidence: tuple[str, ...]
    lines: tuple[str, ...]
    others: tuple[str, ...] = ()
    rules_out: tuple[str, ...] = ()

    @property
    def explained(self) -> bool:
        """Whether a failure is named."""
        return self.class_ not in (UNEXPLAINED, FOREIGN)

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
            "rules_out": list(self.rules_out),
        }


def _plain(text: str) -> str:
    """Text as signatures are compared: lower case, one kind of quote, single blanks."""
    return " ".join(text.translate(_QUOTES).lower().split())


class Signature:
    """A text that programs print, with gaps, as data/diagnosis.yaml writes it.

    `{n}` is a number, `{v}` a version, `{w}` a word or path, `{same}` one character 24 times or more, `{a|b}` one of
    these, `{fail}` one of `words["fail"]`, `*` anything on the line, a final `$` the end of the line; `a & b & c` are
    texts that stand on one line in any order.
    """

    def __init__(self, source: str, words: Mapping[str, Sequence[str]] | None = None) -> None:
        self.source = source
        first, *rest = (_expanded(part, words or {}) for part in source.split(" & "))
        self.plain = first
        self._rest = rest
        # A log that lacks one of these cannot hold the signature.
        self._anchors = [anchor for anchor in map(_anchor, (first, *rest)) if anchor]
        anchor = _anchor(first)
        if not rest and len(anchor) < _FEWEST_ANCHOR and not re.search(r"[\u4e00-\u9fff]", anchor):
            raise ValueError(f"The signature {source!r} has no fixed text of {_FEWEST_ANCHOR} characters.")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The signature's first text as an expression; compiled only for a log that holds the anchors."""
        return _compiled(self.plain)

    @cached_property
    def _others(self) -> list[re.Pattern[str]]:
        return [_compiled(part) for part in self._rest]

    def possible(self, log: Log) -> bool:
        """Whether the log holds each fixed text of the signature."""
        return all(anchor in log.flat for anchor in self._anchors)

    def matches(self, log: Log) -> Iterator[int]:
        """Positions in `log.text`, at most three."""
        if self.possible(log):
            yield from islice(
                self._on_one_line(log.text) if self._rest else _starts(self.pattern, log.text), _MOST_HITS
            )

    def _on_one_line(self, text: str) -> Iterator[int]:
        for match in self.pattern.finditer(text):
            start = max(text.rfind("\n", 0, match.start()) + 1, match.start() - _SPAN)
            end = text.find("\n", match.end(), match.end() + _SPAN)
            around = text[start : match.end() + _SPAN if end < 0 else end]
            if all(other.search(around) for other in self._others):
                yield match.start()

    def sure(self, place: int, log: Log) -> bool:
        """Whether the texts of `a & b` and `a*b` are on one line of the log, not on lines joined on suspicion."""
        loose = self._rest or "*" in self.plain
        return not loose or bool(log.numbers((place,)))

    def cut_off(self, log: Log) -> int | None:
        """Where the log's first line begins in the middle of this text, or its last line ends there."""
        if self._rest or _TOKEN.search(self.plain) or len(self.plain) < _FEWEST_CUT:
            return None
        fewest = max(_FEWEST_CUT, len(self.plain) * 2 // 3)
        if self.plain[:fewest] not in log.last and self.plain[-fewest:] not in log.first:
            return None
        for size in range(len(self.plain) - 1, fewest - 1, -1):
            # Half a number is another number.
            if not self.plain[size - 1].isdigit() and log.last.endswith(self.plain[:size]):
                return log.last_start
            if not self.plain[-size].isdigit() and log.first.startswith(self.plain[-size:]):
                return 0
        return None


def _starts(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    return (match.start() for match in pattern.finditer(text))


def _expanded(part: str, words: Mapping[str, Sequence[str]]) -> str:
    """A part of a signature with the words it names spelled out."""
    return re.sub(
        r"\{(\w+)\}",
        lambda match: "{" + "|".join(map(_plain, words[match[1]])) + "}" if match[1] in words else match[0],
        _plain(part),
    )


def _anchor(plain: str) -> str:
    return max(_TOKEN.split(plain), key=len).strip()


def _compiled(plain: str) -> re.Pattern[str]:
    parts, at = [_left_edge(plain)], 0
    for token in _TOKEN.finditer(plain):
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
        whole = list(logtext.unwrapped(lines))
        for number, line in (*enumerate(lines), *whole, *extra):
            plain.append(_plain(line))
            self._starts.append(length)
            self._line_of.append(number)
            length += len(plain[-1]) + 1
        self.text = "\n".join(plain)
        # Where joined lines stand; two of them may have nothing to do with each other.
        starts = [*self._starts, length]
        self.joined = (starts[len(lines)], starts[len(lines) + len(whole)])
        self.flat = self.text.replace("\n", " ")
        self.first, self.last = (plain[0], plain[len(lines) - 1]) if lines else ("", "")
        self.last_start = self._starts[len(lines) - 1] if lines else 0

    def number_at(self, position: int) -> int:
        """Index of the log's line at a position of `text`; the number of lines for the context's."""
        return self._line_of[bisect_right(self._starts, position) - 1]

    def numbers(self, positions: Iterable[int]) -> set[int]:
        """Indexes of the lines at these positions; lines that were joined on suspicion are left out."""
        return {self.number_at(place) for place in positions if not self.joined[0] <= place < self.joined[1]}

    def shown(self, positions: Iterable[int]) -> tuple[str, ...]:
        """The log's lines at these positions, without repeats and without the context's."""
        numbers = [number for number in map(self.number_at, positions) if number < len(self.lines)]
        return tuple(dict.fromkeys(self.lines[number][:_WIDEST_LINE] for number in numbers))[:_MOST_LINES]


@dataclass(frozen=True)
class Rule:
    """When a class is named: each group has a signature in the log, none of `none` is there, the facts fit.

    `generic` texts are printed by other programs, too.
    """

    class_: str
    confidence: str
    generic: bool
    all: tuple[tuple[Signature, ...], ...]
    none: tuple[Signature, ...]
    where: Mapping[str, str]
    cause: str
    next_steps: tuple[str, ...]
    evidence: tuple[str, ...]

    def hit(self, log: Log, facts: Mapping[str, str]) -> Hit | None:
        """Where the log fits, or None."""
        if not fits(facts, self.where):
            return None
        found: list[int] = []
        confidence = self.confidence
        for group in self.all:
            matches = [(place, signature) for signature in group for place in signature.matches(log)]
            places = sorted(place for place, _ in matches)
            if not places and not self.generic:
                places = [place for signature in group if (place := signature.cut_off(log)) is not None][:1]
            if not places:
                return None
            # The rest of a text that was cut off, or of lines that were joined, may have been another.
            if not any(signature.sure(place, log) for place, signature in matches):
                confidence = CONFIDENCES[-1]
            found += places
        if any(True for signature in self.none for _ in signature.matches(log)):
            return None
        return Hit(self, confidence, found)


@dataclass(frozen=True)
class Hit:
    """A rule that fits a log, how sure that makes, and where."""

    rule: Rule
    confidence: str
    places: list[int]


@dataclass(frozen=True)
class Exclusion:
    """What a version or a healthy line rules out."""

    says: str
    any: tuple[Signature, ...]
    where: Mapping[str, str]

    def told(self, log: Log, facts: Mapping[str, str]) -> str | None:
        """The sentence, if the log gives reason for it."""
        there = not self.any or any(True for signature in self.any for _ in signature.matches(log))
        return self.says.format_map(facts) if there and fits(facts, self.where) else None


@dataclass(frozen=True)
class ClassText:
    """What a class of failures means to a person."""

    title: str
    cause: str
    next_steps: tuple[str, ...]
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The rules in their order, the classes' texts, where facts stand in a log, and whose log it is."""

    rules: tuple[Rule, ...]
    classes: Mapping[str, ClassText]
    facts: Mapping[str, tuple[Signature, ...]]
    exclusions: tuple[Exclusion, ...]
    own: re.Pattern[str]
    foreign: re.Pattern[str]


@cache
def table() -> Table:
    """The table of data/diagnosis.yaml; read once."""
    data = resources.table("diagnosis")
    cite = _Citations(data["marks"], data["repositories"], data["sources"])
    words = data["words"]
    classes = {
        name: ClassText(entry["title"], _flow(entry["cause"]), _steps(entry), cite(entry.get("evidence", {})))
        for name, entry in data["classes"].items()
    }
    rules = [
        Rule(
            class_=entry["class"],
            confidence=entry["confidence"],
            generic=entry.get("generic", False),
            all=tuple(_group(group, words) for group in entry.get("all", [entry.get("any")])),
            none=_group(entry.get("none", []), words),
            where=entry.get("where", {}),
            cause=_flow(entry.get("cause", "")),
            next_steps=_steps(entry),
            evidence=cite(entry.get("evidence", {})),
        )
        for entry in data["rules"]
    ]
    exclusions = [
        Exclusion(_flow(entry["says"]), _group(entry.get("any", []), words), entry.get("where", {}))
        for entry in data["rules_out"]
    ]
    return Table(
        tuple(rules),
        classes,
        {name: _group(texts, words) for name, texts in data["facts"].items()},
        tuple(exclusions),
        *(re.compile("|".join(map(re.escape, map(_plain, data["domain"][whose])))) for whose in ("own", "foreign")),
    )


def _group(texts: str | list[Any], words: Mapping[str, Sequence[str]]) -> tuple[Signature, ...]:
    """The signatures of a text, a list, or a list with lists (YAML aliases) in it."""
    if isinstance(texts, str):
        return (Signature(texts, words),)
    return tuple(signature for text in texts for signature in _group(text, words))


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


def diagnose(
    text: str | Iterable[str], *, context: Mapping[str, object] | None = None, rows: Table | None = None
) -> Diagnosis:
    """Explain a log.

    Args:
        text: the log as one text, or its lines; of a very long one the head and the tail are read.
        context: what the caller knows and the log need not say, such as `{"stage": "load", "signal": "SIGSEGV",
            "driver": "0.9.6", "runtime": "1.2.3"}`. Values of None are ignored.
        rows: another table than that of data/diagnosis.yaml.
    """
    whole = text if isinstance(text, str) else "\n".join(text)
    known = {key: str(value) for key, value in (context or {}).items() if value is not None}
    log = Log(logtext.clean_lines(logtext.shorten(whole)), known)
    rows = rows or table()
    facts = _facts(log, rows) | known
    hits = _hits(log, rows, facts, sure=bool(known))
    if _is_foreign(log, rows, hits, known):
        return _nothing(FOREIGN, log, rows, others=tuple(dict.fromkeys(hit.rule.class_ for hit in hits)))
    if not hits:
        told = (exclusion.told(log, facts) for exclusion in rows.exclusions)
        return _nothing(UNEXPLAINED, log, rows, rules_out=tuple(sentence for sentence in told if sentence))
    best, *rest = hits
    words = rows.classes[best.rule.class_]
    return Diagnosis(
        class_=best.rule.class_,
        confidence=best.confidence,
        title=words.title,
        cause=best.rule.cause or words.cause,
        next_steps=best.rule.next_steps or words.next_steps,
        evidence=tuple(dict.fromkeys((*best.rule.evidence, *words.evidence))),
        lines=log.shown(best.places),
        others=tuple(hit.rule.class_ for hit in rest if hit.confidence != "low" or best.confidence == "low"),
    )


def _hits(log: Log, rows: Table, facts: Mapping[str, str], *, sure: bool) -> list[Hit]:
    """The best rule of each class that fits, best first: by confidence, then in the table's order.

    Args:
        sure: the caller knows that it is a log of RKLLM.
    """
    own = log.numbers(_starts(rows.own, log.text))
    hits: list[Hit] = []
    # Texts that only RKLLM prints come first: generic ones count fully near them.
    for rule in sorted(rows.rules, key=lambda rule: rule.generic):
        if (hit := rule.hit(log, facts)) is None:
            continue
        if not rule.generic:
            own |= log.numbers(hit.places)
        elif not sure:
            hit = replace(hit, confidence=_shared(hit, own, log, rows))
        hits.append(hit)
    order = {id(rule): number for number, rule in enumerate(rows.rules)}
    hits.sort(key=lambda hit: (CONFIDENCES.index(hit.confidence), order[id(hit.rule)]))
    best: dict[str, Hit] = {}
    for hit in hits:
        best.setdefault(hit.rule.class_, hit)
    return list(best.values())


def _shared(hit: Hit, own: set[int], log: Log, rows: Table) -> str:
    """How sure a text that others print, too, makes of a fault of RKLLM; `own` are the numbers of RKLLM's lines."""
    numbers = log.numbers(hit.places) or set(map(log.number_at, hit.places))
    if numbers <= own:
        return hit.confidence
    texts = (_plain(log.lines[number]) for number in numbers - own if number < len(log.lines))
    if not _near(own, numbers, len(log.lines)) or any(map(rows.foreign.search, texts)):
        return CONFIDENCES[-1]
    return CONFIDENCES[min(CONFIDENCES.index(hit.confidence) + 1, len(CONFIDENCES) - 1)]


def _near(own: set[int], numbers: set[int], count: int) -> bool:
    """Whether a line of RKLLM is near one of these lines of a log of `count` lines."""
    reach = count if count <= _SHORT else _NEAR
    return any(abs(number - other) <= reach for number in numbers for other in own)


def _is_foreign(log: Log, rows: Table, hits: list[Hit], known: Mapping[str, str]) -> bool:
    """Whether nothing in the log, and nothing the caller knows, has to do with RKLLM."""
    if known or not log.lines or rows.own.search(log.text) or any(not hit.rule.generic for hit in hits):
        return False
    return not hits or len(log.lines) > _LONG_FOREIGN or rows.foreign.search(log.text) is not None


def _facts(log: Log, rows: Table) -> dict[str, str]:
    """The last value of each fact in the log."""
    facts: dict[str, str] = {}
    for name, signatures in rows.facts.items():
        found = [
            match
            for signature in signatures
            if signature.possible(log)
            for match in signature.pattern.finditer(log.text)
        ]
        if found:
            facts[name] = str(max(found, key=lambda match: match.start()).groups()[-1])
    return facts


def _nothing(
    class_: str, log: Log, rows: Table, *, others: tuple[str, ...] = (), rules_out: tuple[str, ...] = ()
) -> Diagnosis:
    """No failure is named; the lines that look like trouble are shown all the same."""
    words = rows.classes[class_]
    trouble = [line[:_WIDEST_LINE] for line in log.lines if _TROUBLE.search(line)]
    return Diagnosis(
        class_=class_,
        confidence=NONE,
        title=words.title,
        cause=words.cause,
        next_steps=words.next_steps,
        evidence=words.evidence,
        lines=tuple(dict.fromkeys(trouble))[-_MOST_LINES:],
        others=others,
        rules_out=rules_out,
    )
