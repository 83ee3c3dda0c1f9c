"""The speed expected of a bundle: by the plan of its conversion, and by the vendor's figures for such a model, if any.

Both are in the bundle's report/plan.json, which `rkedge convert` writes; both are for clocks at their maximum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rkboard.bench.workload import START, VENDOR_NEW, VENDOR_PROMPT, Row
from rkruntime.bundle.manifest import Bundle

_DIGEST: Final = re.compile(r"[0-9a-f]{16}")
_MOST: Final = 1e9


@dataclass(frozen=True)
class Figures:
    """The figures of one source, each None where the source lacks it.

    Attributes:
        title: The source's name, for people.
        ttft_ms: The time to the first token after a prompt of VENDOR_PROMPT tokens.
        speed: The decode rate in tokens/s with VENDOR_PROMPT + VENDOR_NEW / 2 tokens in the context.
        full: The decode rate with a full context, and the size of that context in tokens; only a plan has these.
    """

    title: str = ""
    ttft_ms: float | None = None
    speed: float | None = None
    memory_mb: float | None = None
    full: tuple[float, float] | None = None

    def of(self, test: Row) -> float | None:
        """Return the tokens/s expected in a test; None if this source says nothing about it."""
        if test.kind == "pp":
            fits = test.tokens == VENDOR_PROMPT and not test.depth and self.ttft_ms
            return VENDOR_PROMPT * 1000 / self.ttft_ms if fits and self.ttft_ms else None
        if test.kind == "vendor":
            return self.speed
        return self._at((test.depth or START) + test.tokens / 2)

    def _at(self, tokens: float) -> float | None:
        """Return the decode rate with so many tokens in the context: a token's time grows with the KV cache."""
        if self.speed is None or self.full is None:
            return None
        speed, context = self.full
        usual = VENDOR_PROMPT + VENDOR_NEW / 2
        if context <= usual:
            return None
        slope = (1 / speed - 1 / self.speed) / (context - usual)
        seconds = 1 / self.speed + slope * (tokens - usual)
        return 1 / seconds if seconds > 0 else None


@dataclass(frozen=True)
class Expected:
    """The expectations for a bundle's model. `digest` identifies the model apart from its weights; empty if unknown."""

    plan: Figures
    vendor: Figures
    digest: str = ""


def expected_of(bundle: Bundle) -> Expected:
    """Read the bundle's plan; values in it that are not figures are ignored. Raises BundleError."""
    plan = bundle.read_plan()
    prediction = _within(plan, "prediction")
    row = _within(prediction, "vendor")
    full, context = _number(plan, "decode_tokens_per_s_at_full_context"), _number(plan, "context")
    digest = _within(plan, "model").get("digest")
    return Expected(
        _figures("plan", plan, (full, context) if full and context else None),
        _figures(f"vendor, {_release(row)}", row) if row else Figures(),
        digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else "",
    )


def _figures(title: str, found: Mapping[str, Any], full: tuple[float, float] | None = None) -> Figures:
    # A row with a prompt of another length is not comparable.
    ttft = None if found.get("prompt_tokens", VENDOR_PROMPT) != VENDOR_PROMPT else _number(found, "ttft_ms")
    speed, memory = _number(found, "decode_tokens_per_s"), _number(found, "memory_mb")
    return Figures(title, ttft, speed, memory, full)


def _within(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    return value if isinstance(value, dict) else {}


def _number(found: Mapping[str, Any], name: str) -> float | None:
    value = found.get(name)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and 0 < value < _MOST else None  # type: ignore[operator,arg-type]


def _release(row: Mapping[str, Any]) -> str:
    release = str(row.get("release"))
    return release if re.fullmatch(r"[\d.b]{1,12}", release, re.ASCII) else "unknown release"
