"""Which quantized type works where: the rules of dtype_rules.yaml, applied to a model before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from rkruntime.errors import RefusedError, UsageError

# One domain of the NPU's address space: 32 bits of addresses (rknpu driver 0.9.8).
DOMAIN_BYTES: Final = 1 << 32
_GROUP: Final = re.compile(r"_g(\d+)$")
# The emulator alone computes in float32, as an oracle for tests.
EMULATOR_ONLY: Final = ("fp32",)


class Verdict(str, Enum):
    """What to do with a type; `impossible` cannot be forced."""

    OK = "ok"
    WARN = "warn"
    REFUSE = "refuse"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Rule:
    """A row of the table, as it stands there."""

    types: tuple[str, ...]
    verdict: Verdict
    reason: str
    evidence: str
    source: str
    platform: str = ""
    toolkit: tuple[str, str] = ("0", "999")
    parameters: tuple[float, float] = (0, math.inf)
    log: tuple[str, ...] = ()
    instead: str = ""

    def matches(self, platform: str, dtype: str, toolkit: str, parameters: int) -> bool:
        """Whether the row speaks of this case."""
        first, last = self.toolkit
        return (
            self.platform in ("", platform)
            and dtype in self.types
            and version_key(first) <= version_key(toolkit) <= version_key(last)
            and self.parameters[0] <= parameters < self.parameters[1]
        )


@dataclass(frozen=True)
class Judgement:
    """A rule's answer for one model.

    Attributes:
        reason: the rule's sentence with the model's own numbers.
    """

    dtype: str
    platform: str
    verdict: Verdict
    reason: str
    rule: Rule


def version_key(version: str) -> tuple[int, ...]:
    """A release as numbers that compare: 1.2.1b1 sorts as 1.2.1."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("b")[0]))


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("dtype_rules.yaml").read_text(encoding="utf-8"))
    return table


@cache
def rules() -> tuple[Rule, ...]:
    """All rows, in order."""
    return tuple(_rule(row) for row in _table()["rules"])


def _rule(row: Mapping[str, Any]) -> Rule:
    lists = {key: tuple(row[key]) for key in ("types", "toolkit", "parameters", "log") if key in row}
    return Rule(**{**row, **lists, "verdict": Verdict(row["verdict"])})


def platforms() -> Mapping[str, Mapping[str, Any]]:
    """SoC -> number of NPU cores and the types that its toolkit accepts."""
    table: Mapping[str, Mapping[str, Any]] = _table()["platforms"]
    return table


def known_types() -> Sequence[str]:
    """Every type that some toolkit release accepts for some SoC."""
    types: Sequence[str] = _table()["known_types"]
    return types


def judge(dtype: str, *, platform: str, toolkit: str, name: str, parameters: int) -> Judgement:
    """What the table says of a model of `parameters` weights, called `name`.

    Raises:
        UsageError: there is no such type or SoC.
    """
    if platform not in platforms():
        raise UsageError(f"There is no SoC {platform!r} in the table.", hint=f"Known are {', '.join(platforms())}.")
    for rule in rules():
        if rule.matches(platform, dtype, toolkit, parameters):
            reason = rule.reason.format(name=name, dtype=dtype, platform=platform, **_sizes(dtype, parameters))
            return Judgement(dtype, platform, rule.verdict, reason, rule)
    raise UsageError(f"There is no quantized type {dtype!r}.", hint=f"Types are {', '.join(known_types())}.")


def _sizes(dtype: str, parameters: int) -> dict[str, str]:
    """Gigabytes of int8 weights, of a float32 scale per group, of both, of float16 weights; and full domains."""
    group = _GROUP.search(dtype)
    scales = 4 * parameters / int(group[1]) if group else 0.0
    total = parameters + scales
    return {
        "weights": _gigabytes(parameters),
        "scales": _gigabytes(scales),
        "total": _gigabytes(total),
        "half": _gigabytes(2 * parameters),
        "domains": str(math.ceil(total / DOMAIN_BYTES)),
    }


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def require(judgement: Judgement, *, force: bool) -> None:
    """Raise RefusedError if the type is refused, unless it can be and is forced."""
    verdict, rule = judgement.verdict, judgement.rule
    if verdict in (Verdict.OK, Verdict.WARN) or (verdict is Verdict.REFUSE and force):
        return
    log = "".join(f"\n    {line}" for line in rule.log)
    advice = f"Use --dtype {rule.instead}." if rule.instead else "Choose another type or SoC."
    raise RefusedError(
        f"{judgement.dtype} on {judgement.platform}: {judgement.reason}{':' if log else '.'}{log}"
        f"\n  evidence: {rule.evidence} ({rule.source})",
        hint=f"{advice} To try it all the same: --force-dtype." if verdict is Verdict.REFUSE else advice,
        details={"dtype": judgement.dtype, "verdict": verdict.value, "evidence": rule.evidence, "source": rule.source},
    )
