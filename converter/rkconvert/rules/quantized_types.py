"""Which quantized type works where: the rules of dtype_rules.yaml, applied to a model before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from rkconvert.rules.releases import release
from rkconvert.rules.type_names import UNQUANTIZED
from rkruntime.abi import CALLABLE
from rkruntime.errors import RefusedError, UsageError

# One domain of the NPU's address space: 32 bits of addresses (rknpu driver 0.9.8).
DOMAIN_BYTES: Final = 1 << 32
# Only the emulator computes in float32, as an oracle for tests.
EMULATOR_ONLY: Final = ("fp32",)
# SoCs that RKEdge plans and converts for; the toolkit supports more.
PLATFORMS: Final = ("rk3588", "rk3576")


class Verdict(str, Enum):
    """What to do with a type; `impossible` cannot be forced."""

    OK = "ok"
    WARN = "warn"
    REFUSE = "refuse"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class TypeRule:
    """A row of dtype_rules.yaml, unchanged."""

    types: tuple[str, ...]
    reason: str
    evidence: str
    source: str
    verdict: Verdict = Verdict.IMPOSSIBLE
    platform: str = ""
    family: str = ""
    figures: bool | None = None
    parameters: tuple[float, float] = (0, math.inf)
    loads: bool = True
    seen: str = ""
    log: tuple[str, ...] = ()
    instead: str = ""

    def matches(self, case: Combination) -> bool:
        """Whether the row applies to this case."""
        return (
            self.platform in ("", case.platform)
            and case.dtype in self.types
            and self.family in ("", case.family)
            and self.figures in (None, case.figures)
            and self.parameters[0] <= case.parameters < self.parameters[1]
        )


@dataclass(frozen=True)
class Combination:
    """A type for a model on a SoC, made by one release of the toolkit.

    Attributes:
        parameters: Number of weights in the model.
        figures: Whether the vendor publishes figures for this exact model and type on this SoC.
        words: Values for the braces in the rules' reasons.
    """

    dtype: str
    platform: str
    toolkit: str
    family: str
    parameters: int
    figures: bool
    words: Mapping[str, object]


@dataclass(frozen=True)
class Judgement:
    """A rule's answer for one model.

    Attributes:
        reason: The rule's sentence with the model's own numbers.
    """

    dtype: str
    platform: str
    reason: str
    rule: TypeRule

    @property
    def verdict(self) -> Verdict:
        """The rule's verdict."""
        return self.rule.verdict


@cache
def _table() -> Mapping[str, Any]:
    table: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("dtype_rules.yaml").read_text(encoding="utf-8"))
    return table


@cache
def rules() -> tuple[TypeRule, ...]:
    """Return the rules for types that can be made, in order."""
    return tuple(_rule(row) for row in _table()["rules"])


@cache
def impossible() -> tuple[TypeRule, ...]:
    """Return the rules for types that cannot be made, in order."""
    return tuple(_rule(row) for row in _table()["impossible"])


def _rule(row: Mapping[str, Any]) -> TypeRule:
    lists = {key: tuple(row[key]) for key in ("types", "parameters", "log") if key in row}
    return TypeRule(**{**row, **lists, "verdict": Verdict(row.get("verdict", Verdict.IMPOSSIBLE))})


def accepted(platform: str, toolkit: str) -> tuple[str, ...]:
    """Return the types of a toolkit release for a SoC. Raises UsageError for a SoC that RKEdge does not support."""
    if platform not in PLATFORMS:
        raise UsageError(f"RKEdge does not support {platform!r}.", hint=f"It supports {', '.join(PLATFORMS)}.")
    return (*release(toolkit).dtypes[platform], UNQUANTIZED)


def cores(platform: str, toolkit: str) -> int:
    """Return the NPU cores of a SoC, according to a toolkit release."""
    return release(toolkit).cores[platform]


@cache
def known_types() -> tuple[str, ...]:
    """Return every type that any toolkit release supports for any SoC, RK3588's first."""
    found = [dtype for item in CALLABLE for types in release(item).dtypes.values() for dtype in types]
    return (*dict.fromkeys(found), UNQUANTIZED)


def judge(case: Combination) -> Judgement:
    """Return what the table says about a case.

    Raises:
        UsageError: There is no such type or SoC.
    """
    if case.dtype not in known_types():
        raise UsageError(f"There is no quantized type {case.dtype!r}.", hint=f"Types are {', '.join(known_types())}.")
    made = accepted(case.platform, case.toolkit)
    rule = next(rule for rule in (rules() if case.dtype in made else impossible()) if rule.matches(case))
    words = {"dtype": case.dtype, "platform": case.platform, "toolkit": case.toolkit, "accepted": ", ".join(made)}
    reason = rule.reason.format(**words, **case.words)
    if rule.seen and rule.seen != case.toolkit:
        reason += f". Nothing is known about it with {case.toolkit}"
    return Judgement(case.dtype, case.platform, reason, rule)


def require(judgement: Judgement, *, force: bool) -> None:
    """Raise RefusedError if the type is refused, unless it can be and is forced."""
    verdict, rule = judgement.verdict, judgement.rule
    if verdict in (Verdict.OK, Verdict.WARN) or (verdict is Verdict.REFUSE and force):
        return
    log = " ".join(rule.log)
    advice = f"Use --dtype {rule.instead}." if rule.instead else "Choose another type or SoC."
    raise RefusedError(
        f"{judgement.dtype} on {judgement.platform}: {judgement.reason}{': ' if log else ''}{log}."
        f" Evidence: {rule.evidence} ({rule.source}).",
        hint=f"{advice} To try it anyway: --force-dtype." if verdict is Verdict.REFUSE else advice,
        details={"dtype": judgement.dtype, "verdict": verdict.value, "evidence": rule.evidence, "source": rule.source},
    )
