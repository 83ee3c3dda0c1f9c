"""How often `rkedge diagnose` is right: on the logs its rules were written from, and on logs that they do not know.

The cross-validation hides all cases of one repository, and a signature counts only if it is also found outside of that
repository, in a case of another one or among the messages of programs (tests/data/messages.yaml). Signatures found
nowhere count in no fold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tests import diagnosis_corpus as corpus
from tests.bench._report import Report
from tests.diagnosis_corpus import Case

from rkruntime.checks import diagnosis, failures
from rkruntime.checks.diagnosis import Diagnosis
from rkruntime.checks.failures import Rule, Table
from rkruntime.checks.signatures import Log, Signature

SURE = ("high", "medium")
LIMITS = """
Rules were corrected after each collection was read, so today's figures on them are too favourable:
[diagnose](diagnose.md) says what the rules reached when they first met each.
"""
# Whose repository the messages of a source belong to; those of the others are in several, or in none of the cases'.
_HOMES = {
    "rknn-llm-examples": "airockchip/rknn-llm",
    "rknn-toolkit2-examples": "airockchip/rknn-toolkit2",
    "rkllama": "NotPunchnox/rkllama",
    "rkllm-gradio": "c0zaut/RKLLM-Gradio",
    "rk3588_npu_llm_server": "av1d/rk3588_npu_llm_server",
}


@dataclass
class Score:
    """Counts of diagnoses; `told` are those of logs that hold a line on the cause."""

    cases: int = 0
    right: int = 0
    told: int = 0
    told_right: int = 0
    wrong_sure: int = 0

    def add(self, case: Case, found: Diagnosis) -> None:
        """Count a diagnosis; sure is a high or medium confidence."""
        right = found.class_ == case.class_
        self.cases += 1
        self.right += right
        self.told += case.holds
        self.told_right += case.holds and right
        self.wrong_sure += not right and found.confidence in SURE

    def __str__(self) -> str:
        return (
            f"{self.right} of {self.cases} right ({self.right / self.cases:.1%}); of those whose text holds the cause "
            f"{self.told_right} of {self.told} ({self.told_right / max(self.told, 1):.1%}); "
            f"wrong with medium or high confidence {self.wrong_sure} ({self.wrong_sure / self.cases:.1%})"
        )


def score(cases: Iterable[Case]) -> Score:
    """The whole table on some cases."""
    total = Score()
    for case in cases:
        total.add(case, diagnosis.diagnose(case.log))
    return total


def _signatures(rule: Rule) -> Iterable[Signature]:
    return (signature for group in rule.all for signature in group)


def sources(table: Table, cases: list[Case]) -> dict[str, set[str]]:
    """Where each signature is found: repositories of cases, and sources of messages."""
    logs = [(case.origin, Log(case.log, {})) for case in cases]
    logs += [(_HOMES.get(message.source, message.source), Log([message.line], {})) for message in corpus.messages()]
    found: dict[str, set[str]] = {}
    for rule in table.rules:
        for signature in _signatures(rule):
            if signature.source not in found:
                found[signature.source] = {origin for origin, log in logs if any(True for _ in signature.matches(log))}
    return found


def _without(table: Table, counts: Callable[[Signature], bool]) -> Table:
    """The table with the signatures that count only; a rule that lacks one of its groups is gone."""
    rules = [replace(rule, all=tuple(tuple(filter(counts, group)) for group in rule.all)) for rule in table.rules]
    return replace(table, rules=tuple(rule for rule in rules if all(rule.all)))


def cross_validation(cases: list[Case]) -> dict[str, Score]:
    """The score of each repository's cases with that repository hidden."""
    table = failures.table()
    found = sources(table, corpus.everything())
    scores: dict[str, Score] = {}
    for hidden in sorted({case.origin for case in cases}):
        rest = _without(table, lambda signature, hidden=hidden: bool(found[signature.source] - {hidden}))  # type: ignore[misc]
        total = scores[hidden] = Score()
        for case in cases:
            if case.origin == hidden:
                total.add(case, diagnosis.diagnose(case.log, rows=rest))
    return scores


def total(scores: Iterable[Score]) -> Score:
    """Scores added up."""
    summed = Score()
    for one in scores:
        for name, value in vars(one).items():
            setattr(summed, name, getattr(summed, name) + value)
    return summed


def _add(report: Report, who: str, found: Score) -> None:
    report.figure("right", who, 100 * found.right / found.cases, "%", note=f"{found.right} of {found.cases}")
    told = f"{found.told_right} of {found.told}"
    report.figure(
        "right where the text shows the cause", who, 100 * found.told_right / max(found.told, 1), "%", note=told
    )
    wrong = f"{found.wrong_sure} of {found.cases}"
    report.figure("wrong with medium or high", who, 100 * found.wrong_sure / found.cases, "%", note=wrong)


def main() -> int:
    """The score of each collection, the largest folds, and what becomes of logs that have no failure."""
    report = Report("diagnosis", __doc__, limits=LIMITS)
    folds = cross_validation(corpus.known())
    _add(report, "known cases", score(corpus.known()))
    _add(report, "known cases, each repository hidden", total(folds.values()))
    for name, fold in sorted(folds.items(), key=lambda item: -item[1].cases)[:4]:
        _add(report, f"{name}, hidden", fold)
    _add(report, "all cases, each repository hidden", total(cross_validation(corpus.everything()).values()))
    _add(report, "second collection", score(corpus.cases("unseen_failures")))
    _add(report, "third collection", score(corpus.cases("fresh_failures")))
    _add(report, "fourth collection", score(corpus.cases("later_failures")))
    _add(report, "fifth collection", score(corpus.cases("recent_failures")))
    for kind in ("foreign", "healthy", "other"):
        found = [diagnosis.diagnose(row["log"]) for row in corpus.other_logs() if row["kind"] == kind]
        healthy, sure = sum(not one.explained for one in found), sum(one.confidence in SURE for one in found)
        report.figure("without a failure", f"{kind} logs", healthy, "", note=f"of {len(found)}")
        report.figure("with one of medium or high", f"{kind} logs", sure, "", note=f"of {len(found)}")
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
