"""A plan as JSON, and drawn in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any, Final

from rich.console import Console, Group, RenderableType  # noqa: TID251 - the name of a type
from rich.table import Table
from rich.text import Text

from rkconvert.model.sizes import cache_bytes_per_token, embedding_bytes, file_bytes, npu_bytes, table_bytes
from rkconvert.plan.answer import answer
from rkconvert.plan.domains import Domain
from rkconvert.plan.planner import Plan, TypeVerdict
from rkconvert.plan.prediction import PROMPT_TOKENS, accuracy, vendor_rows
from rkconvert.rules.quantized_types import DOMAIN_BYTES
from rkruntime.words import counted

_PARTS: Final = {"layers": "blue", "head": "magenta", "cache": "yellow"}
_STATUS: Final = {"ok": "green", "warn": "yellow", "refuse": "red", "impossible": "red dim"}
_BAR: Final = 64
# A glyph for each of _PARTS, and one for free space.
_BLOCKS: Final = "█▓▒░"
_PLAIN: Final = "#=+."


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as `--json` prints it. Sizes are in bytes, but memory_mb is in MiB as in the vendor's table."""
    shape, prediction, costs = plan.shape, plan.prediction, plan.costs
    layers = shape.num_hidden_layers * shape.layer_weights
    return {
        "model": {
            "name": plan.source.name,
            "digest": shape.digest,
            "family": shape.family,
            "parameters": shape.parameters,
            "parts": {
                "embedding": shape.head.weights,
                "layers": layers,
                "head": 0 if shape.tied else shape.head.weights,
                "norms_and_biases": shape.vectors,
            },
            "layers": shape.num_hidden_layers,
            "max_position_embeddings": shape.max_position_embeddings,
            "stored_bytes": plan.source.stored_bytes,
        },
        "board": {"name": plan.board.name, "soc": plan.board.soc, "memory": plan.board.memory},
        "type": plan.kind.name,
        "toolkit": plan.request.toolkit,
        "context": plan.context,
        "decode_tokens_per_s": prediction and round(prediction.decode_tokens_per_s, 2),
        "decode_tokens_per_s_at_full_context": plan.decode_at_full_context and round(plan.decode_at_full_context, 2),
        "ttft_ms": prediction and round(prediction.ttft_ms, 1),
        "memory_mb": prediction and round(prediction.memory_mb, 1),
        "fits": plan.fits,
        "verdict": _verdict(plan.verdict),
        "prediction": {
            "evidence": plan.evidence,
            "release": costs.release,
            "prompt_tokens": PROMPT_TOKENS,
            "rows": sum((row.platform, row.release) == (plan.board.soc, costs.release) for row in vendor_rows()),
            "bandwidth_gb_per_s": round(costs.bandwidth_gb_per_s, 1),
            "errors": {
                figure: {"mean": round(error.mean, 3), "largest": round(error.largest, 3)}
                for figure, error in accuracy(plan.board.soc, plan.kind, costs.release).items()
            },
            "vendor": _vendor(plan),
        },
        "sizes": {
            "file_bytes": round(file_bytes(shape, plan.kind)),
            "npu_weight_bytes": round(npu_bytes(shape, plan.kind)),
            "embedding_bytes": embedding_size(plan),
            "embedding_in": plan.embedding,
            "cache_bytes_per_token": cache_bytes_per_token(shape),
            "cache_bytes": plan.context * cache_bytes_per_token(shape),
            "memory_bytes": round(plan.memory_bytes),
        },
        "domains": [{part: round(size) for part, size in domain.parts.items()} for domain in plan.domains],
        "domain_bytes": DOMAIN_BYTES,
        "ram": [{**asdict(choice), "usable_bytes": round(choice.usable_bytes)} for choice in plan.ram],
        "host": {
            "ram_bytes": round(plan.host.ram_bytes),
            "ram_16_bit_bytes": plan.host.half_bytes and round(plan.host.half_bytes),
            "ram_here_bytes": plan.host.here and plan.host.here.ram,
            "swap_here_bytes": plan.host.here and plan.host.here.swap,
            "missing_bytes": round(plan.host.missing_bytes),
            "disk_bytes": round(plan.host.disk_bytes),
        },
        "verdicts": [_verdict(verdict) for verdict in plan.verdicts],
        "notes": list(plan.notes),
    }


def _vendor(plan: Plan) -> dict[str, Any] | None:
    row = plan.vendor
    if row is None:
        return None
    return {
        "model": row.model,
        "release": row.release,
        "prompt_tokens": row.prompt_tokens,
        "ttft_ms": row.ttft_ms,
        "decode_tokens_per_s": row.decode_tokens_per_s,
        "memory_mb": row.memory_mb,
    }


def _verdict(verdict: TypeVerdict) -> dict[str, Any]:
    plain = asdict(verdict)
    for key in ("file_bytes", "memory_bytes"):
        plain[key] = None if plain[key] is None else round(plain[key])
    speed = verdict.decode_tokens_per_s
    return {**plain, "decode_tokens_per_s": None if speed is None else round(speed, 2)}


def show(plan: Plan, console: Console, *, why: bool = False) -> None:
    """Print the plan as text; with `why`, the reason for each type's verdict."""
    picture = _picture(plan, _glyphs(console), min(_BAR, console.width - 16))
    console.print(Group(_heading(plan), _figures(plan), *picture, _ram(plan), _verdicts(plan, why=why)))
    if not why:
        console.print("--why shows the reasons.", style="dim")
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow", markup=False)


def gigabytes(size: float) -> str:
    """Format a size in GB (1e9 bytes) or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def weights(number: int) -> str:
    """Format a model's number of weights in words."""
    return f"{number / 1e9:.2f} billion weights" if number >= 1e8 else f"{number / 1e6:.2f} million weights"


def _heading(plan: Plan) -> Text:
    shape = plan.shape
    return Text.assemble(
        (f"{answer(plan)}\n\n", _STATUS[plan.verdict.status]),
        (plan.source.name, "bold"),
        f"  {shape.family}, {weights(shape.parameters)}, {counted(shape.num_hidden_layers, 'layer')}",
        f"\n{plan.kind.name} on {plan.board.name}, context {plan.context}, toolkit {plan.request.toolkit}",
        *_warning(plan.verdict),
        "\n",
    )


def _warning(verdict: TypeVerdict) -> list[tuple[str, str]]:
    return [(f"\nwarn: {verdict.reason}", _STATUS["warn"])] if verdict.status == "warn" else []


def _figures(plan: Plan) -> Table:
    shape = plan.shape
    table = Table(box=None, show_header=False, pad_edge=False)
    where = "in flash" if plan.embedding == "flash" else "in RAM"
    rows = [
        (".rkllm file", gigabytes(file_bytes(shape, plan.kind)), ""),
        ("NPU memory", gigabytes(npu_bytes(shape, plan.kind)), "weights, in domains of 4 GiB"),
        ("cache", gigabytes(plan.context * cache_bytes_per_token(shape)), f"{plan.context} tokens"),
        ("embedding", gigabytes(embedding_size(plan)), f"{where}, not read by the NPU"),
        ("board memory", gigabytes(plan.memory_bytes), f"with a full context ({origin(plan)})"),
        *_speeds(plan),
        (
            "to convert",
            gigabytes(plan.host.ram_bytes),
            f"of memory on the PC{_missing(plan)}, and {gigabytes(plan.host.disk_bytes)} of disk space (predicted)",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _speeds(plan: Plan) -> list[tuple[str, str, str]]:
    """Return rows for speed; empty if the model is not expected to load."""
    if plan.prediction is None or plan.decode_at_full_context is None:
        return []
    return [
        (
            "first token",
            f"{plan.prediction.ttft_ms:,.0f} ms",
            f"after a prompt of {PROMPT_TOKENS} tokens ({origin(plan)})",
        ),
        (
            "decode",
            f"{plan.prediction.decode_tokens_per_s:.2f} tokens/s",
            f"{plan.decode_at_full_context:.2f} when the context is full ({origin(plan)})",
        ),
    ]


def origin(plan: Plan) -> str:
    """Say briefly what speed and memory are derived from."""
    if plan.evidence == "predicted":
        return f"predicted from the vendor's figures for {plan.costs.release}"
    return f"from the vendor's figures for this model, {plan.costs.release}"


def embedding_size(plan: Plan) -> float:
    """Return the size of the embedding table, in the file or in RAM, in bytes."""
    return embedding_bytes(plan.shape) if plan.embedding == "flash" else table_bytes(plan.shape)


def _missing(plan: Plan) -> str:
    host = plan.host
    if not host.missing_bytes:
        return ""
    half = f" ({gigabytes(host.half_bytes)} with --toolkit-load-dtype bfloat16)" if host.half_bytes else ""
    return f", {gigabytes(host.missing_bytes)} more than this one has with its swap{half}"


def _glyphs(console: Console) -> str:
    """Return a glyph for each part and for free space, distinct even without color."""
    try:
        _BLOCKS.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return _PLAIN
    return _BLOCKS


def _picture(plan: Plan, glyphs: str, width: int) -> list[RenderableType]:
    legend = Text("\nNPU memory  ")
    for (part, colour), glyph in zip(_PARTS.items(), glyphs, strict=False):
        legend.append(f"{glyph} ", colour).append(f"{part}  ")
    legend.append(f"{glyphs[-1]} free")
    return [legend, *(_domain(number, domain, glyphs, width) for number, domain in enumerate(plan.domains))]


def _domain(number: int, domain: Domain, glyphs: str, width: int) -> Text:
    line = Text(f"domain {number:<2} ")
    drawn, size = 0, 0.0
    for (part, colour), glyph in zip(_PARTS.items(), glyphs, strict=False):
        size += domain.parts.get(part, 0.0)
        end = round(width * size / DOMAIN_BYTES)
        line.append(glyph * (end - drawn), colour)
        drawn = end
    line.append(glyphs[-1] * (width - drawn), "dim")
    return line.append(f" {domain.used / DOMAIN_BYTES:4.0%}")


def _ram(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    for column in ("\nboard RAM", "\nfits", "\nlargest context"):
        table.add_column(column)
    for choice in plan.ram:
        fits = Text("yes", "green") if choice.fits else Text("no", "red")
        table.add_row(f"{choice.gib:g} GiB", fits, f"{choice.largest_context:,}" if choice.largest_context else "-")
    return table


def _verdicts(plan: Plan, *, why: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("\ntype", "\n", "\nfile", "\ntokens/s", "\nwhy" if why else "\nby"):
        table.add_column(column, no_wrap=column != "\nwhy")
    for group in _alike(plan.verdicts):
        first, repeated = group[0], 1 if why else len(group)
        table.add_row(
            Text("\n".join(verdict.type for verdict in group)),
            Text("\n".join([first.status] * repeated), _STATUS[first.status]),
            "\n".join(gigabytes(verdict.file_bytes) if verdict.file_bytes else "" for verdict in group),
            "\n".join(
                f"{speed:.2f}" if (speed := verdict.decode_tokens_per_s) is not None else "" for verdict in group
            ),
            Text(f"{first.reason} ({first.evidence})" if why else "\n".join([first.evidence] * repeated)),
        )
    return table


def _alike(verdicts: Sequence[TypeVerdict]) -> list[list[TypeVerdict]]:
    """Group neighboring verdicts that say the same."""
    return [list(group) for _, group in groupby(verdicts, lambda item: (item.status, item.evidence, item.reason))]
