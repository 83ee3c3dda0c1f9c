"""A plan: whether a model, type and context fit a board, and how fast it will be, before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rkconvert import dtypes
from rkconvert.context import choose_context, round_down
from rkconvert.plan.boards import DEFAULT_BOARD, Board, find_board, usable_bytes
from rkconvert.plan.domains import MOST_DOMAINS, Domain, place
from rkconvert.plan.prediction import Costs, Prediction, Row, costs_of, vendor_rows
from rkconvert.plan.sizes import (
    QuantizedType,
    cache_bytes_per_token,
    embedding_bytes,
    file_bytes,
    npu_bytes,
    parse_type,
)
from rkconvert.plan.source import ModelSource, read_source
from rkconvert.shapes import ModelShape, parse_shape
from rkconvert.toolkit.versions import release
from rkruntime.errors import RefusedError, UsageError

DEFAULT_TOOLKIT: Final = "1.2.3"
# float32: the vendor's examples load a model so, and 1.3.0 is reported to do so on a CPU whatever it was asked for.
_LOADED_BYTES: Final = 4


@dataclass(frozen=True)
class Request:
    """What a plan is asked for; the defaults are those of the command.

    Attributes:
        model: a folder, a config.json or a hub id.
        board: a profile's name or file.
        ram_gib: memory of the board; None for each size that it is sold with.
        context: tokens; None for the model's own up to 4096.
        embedding: where the table for token ids is kept while the model is loaded.
    """

    model: str
    revision: str | None = None
    board: str = DEFAULT_BOARD
    ram_gib: float | None = None
    dtype: str = "w8a8"
    context: int | None = None
    toolkit: str = DEFAULT_TOOLKIT
    embedding: Literal["flash", "ram"] = "flash"


@dataclass(frozen=True)
class RamChoice:
    """A board with one size of memory.

    Attributes:
        largest_context: tokens that fit beside the weights, 0 for none.
    """

    gib: float
    usable_bytes: float
    fits: bool
    largest_context: int


@dataclass(frozen=True)
class HostNeeds:
    """What the vendor's toolkit will need on the machine that converts (predicted)."""

    ram_bytes: float
    ram_here_bytes: float
    disk_bytes: float

    @property
    def swap_bytes(self) -> float:
        """What this machine lacks of that memory."""
        return max(0.0, self.ram_bytes - self.ram_here_bytes)


@dataclass(frozen=True)
class TypeVerdict:
    """What is to be said of one type for this model on this board.

    Attributes:
        status: ok, warn, refuse or impossible, as in the table of types.
        evidence: measured on a board, vendor figure, vendor document, reported or predicted.
        memory_bytes: on the board, with the whole context; None where the type cannot be made.
    """

    type: str
    status: str
    reason: str
    evidence: str
    source: str
    file_bytes: float | None
    memory_bytes: float | None
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """All that is known beforehand of one model, type and context on one board. Sizes are bytes.

    Attributes:
        judgement: what the table of types says of the type that was asked for.
        problem: why the model cannot be loaded whatever the table says; None if it can.
        most_context: the longest that model and toolkit allow.
        vendor: the vendor's own figures for a model of this shape.
    """

    request: Request
    source: ModelSource
    shape: ModelShape
    board: Board
    kind: QuantizedType
    judgement: dtypes.Judgement
    problem: str | None
    context: int
    most_context: int
    prediction: Prediction
    decode_at_full_context: float
    memory_bytes: float
    domains: tuple[Domain, ...]
    ram: tuple[RamChoice, ...]
    host: HostNeeds
    verdicts: tuple[TypeVerdict, ...]
    vendor: Row | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the board, or its largest variant, can hold the model with the whole context."""
        return self.ram[-1].fits


def make_plan(request: Request) -> Plan:
    """Plan for the model that the request names; see `read_source` and `plan_for` for what it raises."""
    return plan_for(read_source(request.model, request.revision), request)


def plan_for(source: ModelSource, request: Request) -> Plan:
    """Plan for a model whose config.json is at hand.

    Raises:
        CheckpointError: see `parse_shape`.
        UsageError: no such board, type or context.
        HostError: no such toolkit.
        RefusedError: nothing is known to predict from, as for a 4-bit type on an RK3588.
    """
    shape = parse_shape(source.config)
    board = find_board(request.board)
    kind = parse_type(request.dtype)
    sizer = _Sizer(shape, board, _costs(board, request.dtype), request)
    judged = sizer.judgement(source.name, request.dtype)
    if not sizer.costs.knows(kind):
        dtypes.require(judged, force=False)
        raise RefusedError(f"Nothing is known of {request.dtype} on {board.soc} to predict its speed from.")
    most = min(shape.max_position_embeddings, release(request.toolkit).context["most"])
    context = choose_context(request.context, shape.max_position_embeddings, release(request.toolkit).context["most"])
    return Plan(
        request=request,
        source=source,
        shape=shape,
        board=board,
        kind=kind,
        judgement=judged,
        problem=sizer.problem(kind, context),
        context=context,
        most_context=round_down(most),
        prediction=sizer.costs.predict(shape, kind),
        decode_at_full_context=1000 / sizer.costs.token_ms(shape, kind, context),
        memory_bytes=sizer.memory(kind, context),
        domains=tuple(place(shape, kind, context)),
        ram=tuple(sizer.choice(gib, kind, context, most) for gib in sizer.rams),
        host=_host_needs(source, shape, kind),
        verdicts=tuple(sizer.verdict(source.name, name, context) for name in _types(board.soc, request.dtype)),
        vendor=_vendor_row(shape, board, kind),
        notes=(*source.notes, *shape.notes, *_notes(shape, board)),
    )


def require(plan: Plan, *, force: bool = False) -> None:
    """Raise RefusedError if the table or the sizes say no; `force` overrules what can at least be tried."""
    dtypes.require(plan.judgement, force=force)
    if plan.problem and not force:
        raise RefusedError(
            f"{plan.kind.name} on {plan.board.name}: {plan.problem}.",
            hint="`rkedge plan` shows which boards and contexts fit. To try it all the same: --force-dtype.",
            details={"evidence": "predicted"},
        )


@dataclass(frozen=True)
class _Sizer:
    """Sizes and verdicts of one model on one board."""

    shape: ModelShape
    board: Board
    costs: Costs
    request: Request

    @property
    def rams(self) -> Sequence[float]:
        return [self.request.ram_gib] if self.request.ram_gib else sorted(self.board.ram_gib)

    def memory(self, kind: QuantizedType, tokens: int) -> float:
        table = embedding_bytes(self.shape) if self.request.embedding == "ram" else 0
        return self.costs.memory_bytes(self.shape, kind, tokens) + table

    def choice(self, gib: float, kind: QuantizedType, context: int, most: int) -> RamChoice:
        usable = usable_bytes(gib)
        left = usable - self.memory(kind, 0)
        largest = max(0, round_down(min(left / cache_bytes_per_token(self.shape), most)))
        return RamChoice(gib, usable, self.memory(kind, context) <= usable, largest)

    def judgement(self, name: str, dtype: str) -> dtypes.Judgement:
        return dtypes.judge(
            dtype,
            platform=self.board.soc,
            toolkit=self.request.toolkit,
            name=name,
            parameters=self.shape.parameters,
        )

    def verdict(self, name: str, dtype: str, context: int) -> TypeVerdict:
        judged, kind = self.judgement(name, dtype), parse_type(dtype)
        if judged.verdict is dtypes.Verdict.IMPOSSIBLE:
            return TypeVerdict(
                dtype, "impossible", judged.reason, judged.rule.evidence, judged.rule.source, None, None, None
            )
        memory = self.memory(kind, context)
        known = self.costs.knows(kind)
        figures = (
            file_bytes(self.shape, kind),
            memory,
            self.costs.predict(self.shape, kind).decode_tokens_per_s if known else None,
        )
        problem = self.problem(kind, context)
        if problem and judged.verdict in (dtypes.Verdict.OK, dtypes.Verdict.WARN):
            return TypeVerdict(dtype, "refuse", problem, "predicted", "sizes of the weights and the cache", *figures)
        return TypeVerdict(
            dtype, judged.verdict.value, judged.reason, judged.rule.evidence, judged.rule.source, *figures
        )

    def problem(self, kind: QuantizedType, context: int) -> str | None:
        """Why it cannot be loaded, whatever the table says of the type."""
        most, memory = self.rams[-1], self.memory(kind, context)
        if memory > usable_bytes(most):
            return (
                f"it needs {memory / 1e9:.1f} GB of memory with a context of {context} tokens, and of {most:g} GiB on"
                f" {self.board.name} about {usable_bytes(most) / 1e9:.1f} GB are left for a program"
            )
        domains = len(place(self.shape, kind, context))
        if domains > MOST_DOMAINS:
            return f"it needs {domains} NPU memory domains of 4 GiB, and the driver knows {MOST_DOMAINS}"
        return None


def _costs(board: Board, dtype: str) -> Costs:
    try:
        return costs_of(board.soc)
    except KeyError:
        known = ", ".join(sorted({row.platform for row in vendor_rows()}))
        raise UsageError(
            f"Nothing is known of the speed of {board.soc} ({board.name}) to predict {dtype} from.",
            hint=f"There are figures for {known}.",
        ) from None


def _types(soc: str, asked: str) -> list[str]:
    accepted = list(dtypes.platforms()[soc]["types"])
    others = [name for name in dtypes.known_types() if name not in accepted]
    names = [*accepted, *others]
    return names if asked in names else [*names, asked]


def _host_needs(source: ModelSource, shape: ModelShape, kind: QuantizedType) -> HostNeeds:
    """Memory: the model in float32 and what is made of it. Disk: the checkpoint and the file."""
    made = file_bytes(shape, kind)
    stored = source.stored_bytes or 2 * shape.parameters
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return HostNeeds(_LOADED_BYTES * shape.parameters + made, here, stored + made)


def _vendor_row(shape: ModelShape, board: Board, kind: QuantizedType) -> Row | None:
    """The vendor's own figures for a model of this very shape."""
    rows = [row for row in vendor_rows() if row.platform == board.soc and row.kind == kind]
    alike = [row for row in rows if row.shape.layer == shape.layer and row.shape.head == shape.head]
    alike = [row for row in alike if row.shape.num_hidden_layers == shape.num_hidden_layers]
    return max(alike, key=lambda row: dtypes.version_key(row.release), default=None)


def _notes(shape: ModelShape, board: Board) -> list[str]:
    notes = []
    largest = max(npu_bytes(row.shape, row.kind) for row in vendor_rows() if row.platform == board.soc)
    if npu_bytes(shape, parse_type("w8a8")) > 1.2 * largest:
        notes.append(
            f"the vendor's largest model on {board.soc} has {largest / 1e9:.1f} GB of weights: beyond that the"
            " prediction is drawn out from smaller ones"
        )
    if board.memory == "LPDDR5":
        notes.append("the prediction is for the vendor's own board; what LPDDR5 changes was not measured")
    return notes
