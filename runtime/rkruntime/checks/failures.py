"""The table of failures, data/diagnosis.yaml: which texts identify a class, what it means and who confirmed it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from rkruntime import resources
from rkruntime.checks.conditions import meets
from rkruntime.checks.signatures import Log, Signature, simplified

CONFIDENCES: Final = ("high", "medium", "low")
"""From best to worst.

high: the text identifies this fault, and no report with another cause is known.
medium: the text goes with this fault in most reports; `others` and the next steps name the alternatives.
low: only a hint, for a log that says nothing better.
A text that other programs print too counts fully on a line of RKLLM's, and one step less near one.
A log without any known text is `unexplained`, one with nothing of RKLLM's in it `not-rkllm`; both have the
confidence `none`.
"""


@dataclass(frozen=True)
class Rule:
    """When a class applies: the log has a signature of each group in `all` and none of `none`, and `where` holds.

    The texts of a `generic` rule are printed by other programs too.
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
        """Return the hit, or None if the rule does not match."""
        if not meets(facts, self.where):
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
            # The missing part of a truncated text may have said something else, and so may lines joined on suspicion.
            if not any(signature.sure(place, log) for place, signature in matches):
                confidence = CONFIDENCES[-1]
            found += places
        if any(True for signature in self.none for _ in signature.matches(log)):
            return None
        return Hit(self, confidence, found)


@dataclass(frozen=True)
class Hit:
    """A rule that matches a log, with the confidence and the positions in the log's text."""

    rule: Rule
    confidence: str
    places: list[int]


@dataclass(frozen=True)
class Exclusion:
    """A failure that a version or a healthy line rules out."""

    says: str
    any: tuple[Signature, ...]
    where: Mapping[str, str]

    def told(self, log: Log, facts: Mapping[str, str]) -> str | None:
        """Return the sentence on what is ruled out, or None if the log does not support it."""
        there = not self.any or any(True for signature in self.any for _ in signature.matches(log))
        return self.says.format_map(facts) if there and meets(facts, self.where) else None


@dataclass(frozen=True)
class ClassText:
    """What a class of failures means, in plain words.

    Attributes:
        machine: Whether the failure is due to this machine, so that another one of its kind does load the model.
    """

    title: str
    cause: str
    next_steps: tuple[str, ...]
    evidence: tuple[str, ...]
    machine: bool = False


@dataclass(frozen=True)
class Table:
    """The rules in order, the texts of the classes, how to find facts in a log, and how to tell whose log it is."""

    rules: tuple[Rule, ...]
    classes: Mapping[str, ClassText]
    facts: Mapping[str, tuple[Signature, ...]]
    exclusions: tuple[Exclusion, ...]
    own: re.Pattern[str]
    foreign: re.Pattern[str]


@cache
def table() -> Table:
    """Read data/diagnosis.yaml, once."""
    data = resources.table("diagnosis")
    cite = _Citations(data["marks"], data["repositories"], data["sources"])
    words = data["words"]
    classes = {
        name: ClassText(
            entry["title"],
            _flow(entry["cause"]),
            _steps(entry),
            cite(entry.get("evidence", {})),
            machine=entry.get("machine", False),
        )
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
        *(re.compile("|".join(map(re.escape, map(simplified, data["domain"][whose])))) for whose in ("own", "foreign")),
    )


def _group(texts: str | list[Any], words: Mapping[str, Sequence[str]]) -> tuple[Signature, ...]:
    """Return the signatures of a text, a list, or a list that contains lists (YAML aliases)."""
    if isinstance(texts, str):
        return (Signature(texts, words),)
    return tuple(signature for text in texts for signature in _group(text, words))


def _flow(text: str) -> str:
    return " ".join(text.split())


def _steps(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_flow(step) for step in entry.get("next_steps", ()))


class _Citations:
    """Formats `rknn-llm#62: reporter` as an address with its reliability."""

    def __init__(self, marks: Mapping[str, str], repositories: Mapping[str, str], sources: Mapping[str, str]) -> None:
        self._marks, self._repositories, self._sources = marks, repositories, sources

    def __call__(self, evidence: Mapping[str, str]) -> tuple[str, ...]:
        """Return the citations, best confirmed first (in the order of `marks`)."""
        ranks = list(self._marks)
        best_first = sorted(evidence.items(), key=lambda item: ranks.index(item[1]))
        return tuple(f"{self._place(key)} ({self._marks[mark]})" for key, mark in best_first)

    def _place(self, key: str) -> str:
        name, number, issue = key.partition("#")
        return f"https://github.com/{self._repositories[name]}/issues/{issue}" if number else self._sources[name]
