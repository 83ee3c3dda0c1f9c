"""Predicted sizes and speeds of one model on one board: what the vendor's figures imply, whatever any rule says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rkconvert.model.shapes import ModelShape
from rkconvert.plan.boards import Board, board_sizes, usable_bytes
from rkconvert.plan.domains import MOST_DOMAINS, place
from rkconvert.plan.prediction import FLASH_SINCE, Benchmark, Costs, accuracy, costs_for, has_flash, nearest, own_rows
from rkconvert.rules.context import CONTEXT_STEP, round_down
from rkconvert.rules.type_names import QuantizedType, parse_type
from rkruntime.errors import UsageError

Embedding: TypeAlias = Literal["flash", "ram"]


@dataclass(frozen=True)
class RamChoice:
    """A board with a given size of memory.

    Attributes:
        largest_context: Tokens that fit beside the weights; 0 if none do.
    """

    gib: float
    usable_bytes: float
    fits: bool
    largest_context: int


def embedding_place(release: str, wanted: Embedding | None) -> Embedding:
    """Return where the embedding table is: as wanted, else in flash if the release supports that. Raises UsageError."""
    flash = has_flash(release)
    if wanted == "flash" and not flash:
        raise UsageError(
            f"RKLLM {release} holds the embedding table in RAM: embed_flash was added in {FLASH_SINCE}.",
            hint=f"Leave --embedding out, or plan for --release {FLASH_SINCE} or later.",
        )
    return wanted or ("flash" if flash else "ram")


@dataclass(frozen=True)
class Sizing:
    """Predicted sizes and speeds of one model on one board, for one context and release.

    Attributes:
        context: In tokens.
        ram_gib: Memory of the board; None for every size that it is sold with.
    """

    shape: ModelShape
    board: Board
    release: str
    context: int
    embedding: Embedding
    ram_gib: float | None = None

    @property
    def rams(self) -> Sequence[float]:
        """Sizes of memory to plan for, in GiB, the largest last."""
        return [self.ram_gib] if self.ram_gib else sorted(self.board.ram_gib)

    @property
    def table(self) -> bool:
        """Whether the embedding table is in RAM."""
        return self.embedding == "ram"

    def vendor(self, kind: QuantizedType, of: str = "") -> Benchmark | None:
        """Return the vendor's figures for this model and type: of release `of`, else nearest to the requested one."""
        rows = own_rows(self.board.soc, kind, self.shape)
        if of:
            return rows.get(of)
        return rows[nearest(rows, self.release)] if rows else None

    def costs(self, kind: QuantizedType) -> Costs:
        """Return the prediction's constants. Raises KeyError if the vendor has no figures to fit them to."""
        return costs_for(self.board.soc, kind, self.release, self.shape)

    def memory(self, kind: QuantizedType, tokens: float) -> float:
        """Return the memory with `tokens` in the cache, in bytes."""
        return self.costs(kind).memory_bytes(self.shape, kind, tokens, self.table)

    def needed(self, kind: QuantizedType, tokens: float) -> float:
        """Return the bytes of memory that a board must have: the prediction plus the largest error of such predictions.

        Nothing is added if the vendor measured this exact model with this release.
        """
        if self.vendor(kind, self.release):
            return self.memory(kind, tokens)
        costs = self.costs(kind)
        seen = [accuracy(self.board.soc, each, costs.release) for each in (kind, kind.ungrouped, parse_type("w8a8"))]
        margin = max((errors["memory_mb"].largest for errors in seen if errors), default=0.0)
        return self.memory(kind, tokens) * (1 + margin)

    def choice(self, gib: float, kind: QuantizedType, most: int) -> RamChoice:
        """Judge a board with `gib` of memory; `most` is the model's and the toolkit's limit on the context."""
        usable = usable_bytes(gib)
        empty = self.needed(kind, 0)
        token = self.needed(kind, 1) - empty
        largest = max(0, round_down(min((usable - empty) / token, most)))
        return RamChoice(gib, usable, self.needed(kind, self.context) <= usable, largest)

    def speed(self, kind: QuantizedType) -> float:
        """Return decoded tokens per second with a short context."""
        return self.costs(kind).predict(self.shape, kind, self.table).decode_tokens_per_s

    def problem(self, kind: QuantizedType) -> str | None:
        """Return why the model cannot be loaded, by sizes alone; None if it can."""
        soc, most = self.board.soc, self.rams[-1]
        largest = max([most, *board_sizes(soc)])
        least = self.needed(kind, CONTEXT_STEP)
        if least > usable_bytes(largest):
            return (
                f"it fits no {soc} board: it needs {least / 1e9:.1f} GB of memory without any context, but the largest"
                f" board ({largest:g} GiB) leaves about {usable_bytes(largest) / 1e9:.1f} GB for a program"
            )
        memory = self.needed(kind, self.context)
        if memory > usable_bytes(most):
            return (
                f"it needs {memory / 1e9:.1f} GB of memory with a context of {self.context} tokens, but"
                f" {self.board.name} with {most:g} GiB leaves about {usable_bytes(most) / 1e9:.1f} GB for a program"
            )
        domains = len(place(self.shape, kind, self.context))
        if domains > MOST_DOMAINS:
            return f"it needs {domains} NPU memory domains of 4 GiB, but the driver supports {MOST_DOMAINS}"
        return None
