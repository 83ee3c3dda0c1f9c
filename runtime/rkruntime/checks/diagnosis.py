"""Explain what went wrong, from a log of RKLLM, RKNN, the NPU's kernel driver or rkllm-toolkit.

docs/diagnose.md says how to read the table of failures and how to extend it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from rkruntime.checks import logtext
from rkruntime.checks.failures import CONFIDENCES, Hit, Table, table
from rkruntime.checks.longlog import ReadLog, read_text
from rkruntime.checks.signatures import MOST_LINES, WIDEST_LINE, Log, simplified, starts
from rkruntime.schema import check_value
from rkruntime.words import counted

UNEXPLAINED: Final = "unexplained"
FOREIGN: Final = "not-rkllm"
NONE: Final = "none"
_NEAR: Final = 10
"""Within this many lines of a line of RKLLM's, a text that other programs print too counts as RKLLM's."""
_SHORT: Final = 40
"""A log of at most this many lines is about one thing: all its lines are near each other."""
_LONG_FOREIGN: Final = 4
"""A log of this many lines without one of RKLLM's is not an RKLLM log, whatever else it says."""
_TROUBLE = re.compile(
    r"error|fail|fatal|abort|traceback|exception|cannot|invalid|denied|^e |错误|失败|无法", re.IGNORECASE
)


@dataclass(frozen=True)
class Diagnosis:
    """The explanation of a log.

    Attributes:
        class_: Row of the taxonomy, or `unexplained`.
        confidence: `high`, `medium`, `low` or `none`; see `CONFIDENCES`.
        title: The class in a few plain words.
        cause: What the failure means, and which part of the explanation is not confirmed.
        next_steps: What to do, in order.
        evidence: Sources, each with who confirmed it.
        lines: The log lines that led to the class; for `unexplained`, those that look like trouble.
        others: Other classes whose texts are in the log, best first.
        rules_out: Failures that versions and healthy lines exclude, if none was found.
        not_read: How much of the log was not searched; empty if all of it was.
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
    not_read: str = ""

    @property
    def explained(self) -> bool:
        """Whether a failure was identified."""
        return self.class_ not in (UNEXPLAINED, FOREIGN)

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis as `rkedge diagnose --json` prints it and errors carry it."""
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
            "not_read": self.not_read,
        }


def diagnose(
    text: str | Iterable[str] | ReadLog, *, context: Mapping[str, object] | None = None, rows: Table | None = None
) -> Diagnosis:
    """Explain a log.

    Args:
        text: The log as one string, its lines, or the result of `longlog.read_log`.
        context: What the caller knows beyond the log, such as `{"stage": "load", "signal": "SIGSEGV",
            "driver": "0.9.6", "runtime": "1.2.3"}`. Values of None are ignored.
        rows: Table to use instead of data/diagnosis.yaml.

    Raises:
        UsageError: An argument has a wrong type.
    """
    check_value("context", Mapping[str, object] | None, context)
    rows = rows or table()
    read = text if isinstance(text, ReadLog) else _read(text, rows)
    known = {key: str(value) for key, value in (context or {}).items() if value is not None}
    return replace(_explained(read.text, known, rows), not_read=_not_read(read))


def is_machine(found: Mapping[str, Any]) -> bool:
    """Whether a diagnosis (`Diagnosis.as_dict`) is more than a hint, and is about the machine rather than its model."""
    words = table().classes.get(found["class"])
    return words is not None and words.machine and found["confidence"] in CONFIDENCES[:-1]


def _read(text: str | Iterable[str], rows: Table) -> ReadLog:
    lines = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else text
    check_value("text", Sequence[str], lines)
    return read_text("\n".join(lines), rows)


def _not_read(read: ReadLog) -> str:
    if not read.skipped_lines:
        return ""
    return (
        f"{counted(read.skipped_lines, 'line')} ({read.skipped_bytes / 1e6:,.1f} MB) between the head and the tail of"
        " this log: they are unlike any others, and too many. Give the part around the failure."
    )


def _explained(text: str, known: dict[str, str], rows: Table) -> Diagnosis:
    log = Log(logtext.clean_lines(text), known)
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
    """Return the best matching rule of each class, ordered by confidence, then by the table.

    Args:
        sure: The caller knows that the log is RKLLM's.
    """
    own = log.numbers(starts(rows.own, log.text))
    hits: list[Hit] = []
    # Texts that only RKLLM prints come first, as generic texts count fully near them.
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
    """Return the confidence of a hit whose text other programs print too. `own` has the numbers of RKLLM's lines."""
    numbers = log.numbers(hit.places) or set(map(log.number_at, hit.places))
    if numbers <= own:
        return hit.confidence
    texts = (simplified(log.lines[number]) for number in numbers - own if number < len(log.lines))
    if not _near(own, numbers, len(log.lines)) or any(map(rows.foreign.search, texts)):
        return CONFIDENCES[-1]
    return CONFIDENCES[min(CONFIDENCES.index(hit.confidence) + 1, len(CONFIDENCES) - 1)]


def _near(own: set[int], numbers: set[int], count: int) -> bool:
    """Whether one of RKLLM's lines (`own`) is near one of the lines `numbers`, in a log of `count` lines."""
    reach = count if count <= _SHORT else _NEAR
    return any(abs(number - other) <= reach for number in numbers for other in own)


def _is_foreign(log: Log, rows: Table, hits: list[Hit], known: Mapping[str, str]) -> bool:
    """Whether nothing in the log, and nothing the caller knows, points to RKLLM."""
    if known or not log.lines or rows.own.search(log.text) or any(not hit.rule.generic for hit in hits):
        return False
    return not hits or len(log.lines) > _LONG_FOREIGN or rows.foreign.search(log.text) is not None


def _facts(log: Log, rows: Table) -> dict[str, str]:
    """Return the last value of each fact in the log."""
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
    """Return a diagnosis without a failure, which still shows the lines that look like trouble."""
    words = rows.classes[class_]
    trouble = [line[:WIDEST_LINE] for line in log.lines if _TROUBLE.search(line)]
    return Diagnosis(
        class_=class_,
        confidence=NONE,
        title=words.title,
        cause=words.cause,
        next_steps=words.next_steps,
        evidence=words.evidence,
        lines=tuple(dict.fromkeys(trouble))[-MOST_LINES:],
        others=others,
        rules_out=rules_out,
    )
