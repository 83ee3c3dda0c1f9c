"""Plan whether a model, type and context fit a board, and how fast it will be, before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from rkconvert.model.groups import SOURCE as GROUP_SOURCE
from rkconvert.model.groups import misfit
from rkconvert.model.shapes import ModelShape, parse_shape
from rkconvert.model.sizes import (
    HALF_BYTES,
    SCALE_BYTES,
    file_bytes,
    npu_bytes,
    npu_weights,
    scale_groups,
)
from rkconvert.output.host_memory import HostMemory, read_memory
from rkconvert.plan.boards import DEFAULT_BOARD, Board, find_board
from rkconvert.plan.domains import Domain, place
from rkconvert.plan.prediction import (
    Benchmark,
    Costs,
    Prediction,
    vendor_rows,
)
from rkconvert.plan.sizing import Embedding, RamChoice, Sizing, embedding_place
from rkconvert.plan.source import ModelSource, read_source
from rkconvert.rules import quantized_types as dtypes
from rkconvert.rules.context import choose_context, round_down
from rkconvert.rules.releases import LOADED_BYTES, ToolkitRelease, release
from rkconvert.rules.type_names import QuantizedType, parse_type
from rkruntime.abi import DEFAULT_RELEASE, check_release
from rkruntime.errors import HostError, RefusedError, UsageError

_MOST_RAM: Final = 1024
_SIZES: Final = "sizes of the weights and the cache, and the vendor's memory figures"


@dataclass(frozen=True)
class PlanRequest:
    """Options of a plan, with the command's defaults.

    Attributes:
        model: Folder, config.json or hub id.
        board: Profile's name or file.
        ram_gib: Memory of the board; None for every size that it is sold with.
        context: In tokens; None for the model's own limit, but no more than 4096.
        embedding: Place of the embedding table while the model is loaded; None for flash if the release supports it.
    """

    model: str
    revision: str | None = None
    board: str = DEFAULT_BOARD
    ram_gib: float | None = None
    dtype: str = "w8a8"
    context: int | None = None
    toolkit: str = DEFAULT_RELEASE
    embedding: Embedding | None = None

    def __post_init__(self) -> None:
        if self.ram_gib is not None and not 1 <= self.ram_gib <= _MOST_RAM:  # refuses NaN, too
            raise UsageError(f"--ram {self.ram_gib:g}: a board has 1 to {_MOST_RAM} GiB of memory.")


@dataclass(frozen=True)
class HostNeeds:
    """Predicted needs of the vendor's toolkit on the converting machine.

    Attributes:
        ram_bytes: With weights loaded as float32, the toolkit's default.
        half_bytes: With weights loaded in 16 bits; None if the release does not do that on a CPU.
        here: Memory of this machine; None if it cannot be read.
    """

    ram_bytes: float
    half_bytes: float | None
    here: HostMemory | None
    disk_bytes: float

    @property
    def missing_bytes(self) -> float:
        """Bytes of memory that this machine lacks, its swap included."""
        return max(0.0, self.ram_bytes - self.here.total) if self.here else 0.0


@dataclass(frozen=True)
class TypeVerdict:
    """Verdict on one type for this model on this board.

    Attributes:
        status: `ok`, `warn`, `refuse` or `impossible`, as in the table of types.
        evidence: One of: measured on a board, vendor figure, vendor tool, reported, emulated, predicted.
        file_bytes, memory_bytes: Size, and board memory with a full context; None if the type cannot be made.
        decode_tokens_per_s: None if the model is not expected to load.
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
    """All that is known in advance about one model, type and context on one board. Sizes are bytes.

    Attributes:
        judgement: What the table of types says about the requested type.
        problem: Reason why the model cannot be loaded, whatever the table says; None if it can.
        most_context: Longest context that model and toolkit allow.
        embedding: Place of the embedding table while the model is loaded, `flash` or `ram`.
        prediction: None if the model is not expected to load.
        costs: Constants that the prediction uses.
        vendor: Vendor's figures for this exact model and type, from the requested release or the nearest one.
    """

    request: PlanRequest
    source: ModelSource
    shape: ModelShape
    board: Board
    kind: QuantizedType
    judgement: dtypes.Judgement
    problem: str | None
    context: int
    most_context: int
    embedding: Embedding
    costs: Costs
    prediction: Prediction | None
    decode_at_full_context: float | None
    memory_bytes: float
    domains: tuple[Domain, ...]
    ram: tuple[RamChoice, ...]
    host: HostNeeds
    verdicts: tuple[TypeVerdict, ...]
    vendor: Benchmark | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the board, or its largest variant, can hold the model with a full context."""
        return self.problem is None

    @property
    def verdict(self) -> TypeVerdict:
        """Verdict on the requested type."""
        return next(verdict for verdict in self.verdicts if verdict.type == self.kind.name)

    @property
    def evidence(self) -> str:
        """Origin of speed and memory: the vendor's table for this model, type and release, or a prediction."""
        vendor = self.vendor
        return "vendor figure" if vendor and vendor.release == self.request.toolkit else "predicted"


def make_plan(request: PlanRequest) -> Plan:
    """Plan for the requested model; see also `read_source` and `plan_for` for errors raised.

    Raises:
        UsageError: The release is unknown.
    """
    check_release(request.toolkit)
    return plan_for(read_source(request.model, request.revision), request)


def plan_for(source: ModelSource, request: PlanRequest) -> Plan:
    """Plan for a model whose config.json is at hand.

    Raises:
        CheckpointError: See `parse_shape` and `choose_context`.
        UsageError: No such board, type or context, or the release cannot keep the embedding table there.
        HostError: No such toolkit.
        RefusedError: The toolkit does not support the type for that SoC.
    """
    toolkit = release(request.toolkit)
    shape = parse_shape(source.config)
    board = find_board(request.board)
    limit = toolkit.context["most"]
    context = choose_context(request.context, shape.max_position_embeddings, limit)
    table = embedding_place(request.toolkit, request.embedding)
    sizing = Sizing(shape, board, request.toolkit, context, table, request.ram_gib)
    judge = _Judge(source.name, sizing)
    judged = judge.judgement(request.dtype)
    if judged.verdict is dtypes.Verdict.IMPOSSIBLE:
        dtypes.require(judged, force=False)
    kind = parse_type(request.dtype)
    costs, unmade = sizing.costs(kind), misfit(shape, kind)
    problem = unmade.sentence if unmade else sizing.problem(kind)
    loads = problem is None and judged.rule.loads
    most = min(shape.max_position_embeddings, limit)
    return Plan(
        request=request,
        source=source,
        shape=shape,
        board=board,
        kind=kind,
        judgement=judged,
        problem=problem,
        context=context,
        most_context=round_down(most),
        embedding=sizing.embedding,
        costs=costs,
        prediction=costs.predict(shape, kind, sizing.table) if loads else None,
        decode_at_full_context=1000 / costs.token_ms(shape, kind, context) if loads else None,
        memory_bytes=sizing.memory(kind, context),
        domains=tuple(place(shape, kind, context)),
        ram=tuple(sizing.choice(gib, kind, most) for gib in sizing.rams),
        host=_host_needs(source, shape, kind, toolkit),
        verdicts=tuple(judge.verdict(name) for name in _types(board.soc, request)),
        vendor=sizing.vendor(kind),
        notes=(*source.notes, *shape.notes, *_notes(shape, board, costs, request)),
    )


def require(plan: Plan, *, force: bool = False) -> None:
    """Raise RefusedError if the sizes or the table say no; `force` allows whatever can at least be tried."""
    if plan.problem and not force:
        raise RefusedError(
            f"{plan.kind.name} on {plan.board.name}: {plan.problem}.",
            hint="`rkedge plan` shows which boards and contexts fit.",
            details={"evidence": plan.verdict.evidence},
        )
    dtypes.require(plan.judgement, force=force)


@dataclass(frozen=True)
class _Judge:
    """What the table of types says about a model, in words with the model's own sizes and speeds."""

    name: str
    sizing: Sizing

    def judgement(self, dtype: str) -> dtypes.Judgement:
        made = dtype in dtypes.accepted(self.sizing.board.soc, self.sizing.release)
        kind = parse_type(dtype)
        case = dtypes.Combination(
            dtype=dtype,
            platform=self.sizing.board.soc,
            toolkit=self.sizing.release,
            family=self.sizing.shape.family,
            parameters=self.sizing.shape.parameters,
            figures=self.sizing.vendor(kind) is not None,
            words={"name": self.name, **self._sizes(kind), **(self._speeds(kind) if made else {})},
        )
        return dtypes.judge(case)

    def _sizes(self, kind: QuantizedType) -> dict[str, str]:
        """Return gigabytes of int8 weights, of a float32 scale per group, and of float16 weights; and full domains."""
        weights, scales = npu_weights(self.sizing.shape), SCALE_BYTES * scale_groups(self.sizing.shape, kind)
        return {
            "weights": _billions(weights),
            "scales": _billions(scales),
            "half": _billions(HALF_BYTES * weights),
            "domains": str(math.ceil((weights + scales) / dtypes.DOMAIN_BYTES)),
        }

    def _speeds(self, kind: QuantizedType) -> dict[str, str]:
        """Return speeds of a type and of w8a8: the vendor's if one release has both, else predicted."""
        own, plain = self.sizing.vendor(kind), parse_type("w8a8")
        beside = self.sizing.vendor(plain, own.release) if own else None
        pair = (
            own.decode_tokens_per_s if own else self.sizing.speed(kind),
            (beside.decode_tokens_per_s if beside else self.sizing.speed(plain)),
        )
        return {
            "speed": f"{pair[0]:.2f}",
            "w8a8": f"{pair[1]:.2f}",
            "share": f"{100 * pair[0] / pair[1]:.0f}",
            "figures": self._figures(own),
            "w8a8_figures": self._figures(beside),
        }

    def _figures(self, row: Benchmark | None) -> str:
        if row is None:
            return ""
        asked = self.sizing.release
        other = "" if row.release == asked else f"; it has none for {asked}"
        return f"{row.decode_tokens_per_s:.2f} tokens/s in {row.memory_mb:,.0f} MiB (release {row.release}{other})"

    def verdict(self, dtype: str) -> TypeVerdict:
        judged, kind = self.judgement(dtype), parse_type(dtype)
        rule = judged.rule
        said = TypeVerdict(dtype, rule.verdict.value, judged.reason, rule.evidence, rule.source, None, None, None)
        if judged.verdict is dtypes.Verdict.IMPOSSIBLE:
            return said
        if found := misfit(self.sizing.shape, kind):
            return replace(said, status="refuse", reason=found.sentence, evidence="vendor tool", source=GROUP_SOURCE)
        said = replace(
            said,
            file_bytes=file_bytes(self.sizing.shape, kind),
            memory_bytes=self.sizing.memory(kind, self.sizing.context),
        )
        if problem := self.sizing.problem(kind):
            return replace(said, status="refuse", reason=problem, evidence="predicted", source=_SIZES)
        return replace(said, decode_tokens_per_s=self.sizing.speed(kind)) if rule.loads else said


def _billions(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def _types(soc: str, request: PlanRequest) -> list[str]:
    return list(dict.fromkeys([*dtypes.accepted(soc, request.toolkit), *dtypes.known_types()]))


def _host_needs(source: ModelSource, shape: ModelShape, kind: QuantizedType, toolkit: ToolkitRelease) -> HostNeeds:
    """Predict what converting needs. Memory: the loaded model and the converted file. Disk: both files."""
    made = file_bytes(shape, kind)
    stored = source.stored_bytes or 2 * shape.parameters
    try:
        here = read_memory()
    except HostError:
        here = None
    whole, half = (LOADED_BYTES[name] * shape.parameters + made for name in ("float32", "bfloat16"))
    return HostNeeds(whole, half if toolkit.loads_half("cpu") else None, here, stored + made)


def _notes(shape: ModelShape, board: Board, costs: Costs, request: PlanRequest) -> list[str]:
    notes = []
    if costs.release != request.toolkit:
        notes.append(
            f"the vendor has no figures for release {request.toolkit} with this type on {board.soc}: speed and memory"
            f" are derived from those for {costs.release}"
        )
    rows = [row for row in vendor_rows() if (row.platform, row.release) == (board.soc, costs.release)]
    largest = max(npu_bytes(row.shape, row.kind) for row in rows)
    if npu_weights(shape) > 1.2 * largest:
        notes.append(
            f"the vendor's largest model on {board.soc} with {costs.release} has {largest / 1e9:.1f} GB of weights:"
            " beyond that the prediction is extrapolated from smaller ones"
        )
    if board.memory == "LPDDR5":
        notes.append("the prediction is for the vendor's own board; the effect of LPDDR5 has not been measured")
    return notes
