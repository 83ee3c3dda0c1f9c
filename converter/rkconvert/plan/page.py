"""A plan as one self-contained HTML page with plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.model.sizes import cache_bytes_per_token, file_bytes, npu_bytes
from rkconvert.output.html import page_template
from rkconvert.plan.answer import answer
from rkconvert.plan.planner import Plan
from rkconvert.plan.prediction import PROMPT_TOKENS
from rkconvert.plan.report import embedding_size, gigabytes, origin
from rkconvert.rules.quantized_types import DOMAIN_BYTES
from rkruntime.files import atomic_file
from rkruntime.words import counted

_WIDTH: Final = 560.0
_HEIGHT: Final = 200.0
_BAR_HEIGHT: Final = 22.0
_POINTS: Final = 33


@dataclass(frozen=True)
class Segment:
    """A segment of a bar: its part, start and width, in drawing units, and its label."""

    part: str
    x: float
    width: float
    label: str


@dataclass(frozen=True)
class Line:
    """A level drawn across a plot."""

    y: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A plot over the context: an SVG polyline, the values at its ends, and levels for comparison."""

    title: str
    points: str
    first: str
    last: str
    last_context: str
    levels: tuple[Line, ...] = ()


def write(plan: Plan, path: Path) -> None:
    """Write the page. Raises OutputError or HostError if it cannot be written."""
    page = render(plan)
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render(plan: Plan) -> str:
    """Return the page as HTML text."""
    return page_template("rkconvert.plan", gigabytes=gigabytes).render(
        plan=plan,
        width=_WIDTH,
        height=_HEIGHT,
        bar_height=_BAR_HEIGHT,
        figures=_figures(plan),
        domains=[_bar(domain.parts) for domain in plan.domains],
        curves=[_memory_curve(plan), *([_speed_curve(plan)] if plan.prediction else [])],
        answer=answer(plan),
        origin=origin(plan),
        prompt_tokens=PROMPT_TOKENS,
    )


def _figures(plan: Plan) -> list[tuple[str, str, str]]:
    shape, prediction = plan.shape, plan.prediction
    speeds = (
        [
            (f"{prediction.decode_tokens_per_s:.2f}", "tokens/s", origin(plan)),
            (f"{prediction.ttft_ms:,.0f} ms", f"to first token, {PROMPT_TOKENS}-token prompt", origin(plan)),
        ]
        if prediction
        else []
    )
    return [
        *speeds,
        (gigabytes(plan.memory_bytes), f"memory at {plan.context} tokens of context", origin(plan)),
        (gigabytes(file_bytes(shape, plan.kind)), ".rkllm file", "without tokenizer"),
        (
            gigabytes(npu_bytes(shape, plan.kind)),
            "NPU weights",
            f"{counted(len(plan.domains), 'domain')} of 4 GiB",
        ),
        (gigabytes(embedding_size(plan)), "embedding table", f"in {plan.embedding}"),
    ]


def _bar(parts: dict[str, float]) -> list[Segment]:
    segments, x = [], 0.0
    for part, size in parts.items():
        width = _WIDTH * size / DOMAIN_BYTES
        segments.append(Segment(part, round(x, 2), round(width, 2), f"{part}: {gigabytes(size)}"))
        x += width
    return segments


def _memory_curve(plan: Plan) -> Curve:
    at_zero = plan.memory_bytes - plan.context * cache_bytes_per_token(plan.shape)
    per_token = cache_bytes_per_token(plan.shape)
    top = 1.1 * max(at_zero + plan.most_context * per_token, *(choice.usable_bytes for choice in plan.ram))
    levels = tuple(
        Line(_height(choice.usable_bytes, top), f"what a board of {choice.gib:g} GiB leaves") for choice in plan.ram
    )
    return _curve(
        plan, "Memory by context", lambda tokens: at_zero + tokens * per_token, top, lambda v: gigabytes(v), levels
    )


def _speed_curve(plan: Plan) -> Curve:
    def speed(tokens: float) -> float:
        return 1000 / plan.costs.token_ms(plan.shape, plan.kind, tokens)

    return _curve(plan, "Decoded tokens per second by context", speed, 1.15 * speed(0), lambda v: f"{v:.2f}", ())


def _curve(
    plan: Plan,
    title: str,
    value: Callable[[float], float],
    top: float,
    label: Callable[[float], str],
    levels: Sequence[Line],
) -> Curve:
    steps = [plan.most_context * step / (_POINTS - 1) for step in range(_POINTS)]
    points: list[Any] = [f"{_WIDTH * tokens / plan.most_context:.1f},{_height(value(tokens), top)}" for tokens in steps]
    return Curve(
        title=title,
        points=" ".join(points),
        first=label(value(0)),
        last=label(value(plan.most_context)),
        last_context=f"{plan.most_context:,}",
        levels=tuple(levels),
    )


def _height(value: float, top: float) -> float:
    return round(_HEIGHT * (1 - value / top), 1)
