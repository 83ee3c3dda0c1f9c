"""The model that a matrix is about, and which cells the matrix has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, Final

from rkconvert.compat.cells import Cell, LoraMode
from rkconvert.model.shapes import ModelShape, parse_shape
from rkconvert.plan.source import ModelSource
from rkconvert.rules.context import CONTEXT_STEP
from rkconvert.rules.quantized_types import PLATFORMS, cores, known_types
from rkruntime.abi import CALLABLE, check_release
from rkruntime.errors import UsageError
from rkruntime.evidence import MOST_CONTEXT

# The context that files are usually made with, in tokens: the longest for Gemma 2 that every release takes.
USUAL_CONTEXT: Final = 4096
# More cells than this are a typing error, not a question.
_MOST_CELLS: Final = 20_000
# Name of a bundle's copy of its model's config.json, by which evidence on the model can be looked up.
CONFIG_REPORT: Final = "config"
_NAMES: Final = ("model_type", "architectures", "hidden_act", "hidden_activation", "torch_dtype", "dtype")
_LAYERS: Final = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class Case:
    """A model by its configuration."""

    source: ModelSource
    shape: ModelShape

    @classmethod
    def of(cls, source: ModelSource) -> Case:
        """Read a model's shape. Raises CheckpointError if config.json does not describe a decoder that can be sized."""
        return cls(source, parse_shape(source.config))

    @property
    def digest(self) -> str:
        """Key that result files are matched by; the same for models that differ only in their weights."""
        return self.shape.digest


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what describes the model in a config.json: numbers, switches and the names of its kind, but no path."""
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, (int, float)) or value is None or key in _NAMES or _numbers(value)
    }


def _numbers(value: Any) -> bool:
    """Whether a value is a list of numbers, or of the kinds of layers."""
    return isinstance(value, list) and all(isinstance(item, (int, float)) or item in _LAYERS for item in value)


@dataclass(frozen=True)
class Wanted:
    """Values of each dimension; empty for the usual ones: every type, both SoCs, all their cores, every release.

    Raises:
        UsageError: A value is unknown, or the product is too large.
    """

    types: Sequence[str] = ()
    socs: Sequence[str] = ()
    cores: Sequence[int] = ()
    releases: Sequence[str] = ()
    contexts: Sequence[int] = (USUAL_CONTEXT,)
    loras: Sequence[LoraMode] = field(default=("merged",))

    def __post_init__(self) -> None:
        for release in self.releases:
            check_release(release)
        for name, given, known in (("type", self.types, known_types()), ("SoC", self.socs, PLATFORMS)):
            for value in given:
                if value not in known:
                    raise UsageError(f"There is no {name} {value!r}.", hint=f"There are {', '.join(known)}.")
        for context in self.contexts:
            if context % CONTEXT_STEP or not CONTEXT_STEP <= context <= MOST_CONTEXT:
                most, step = f"{MOST_CONTEXT:,}", CONTEXT_STEP
                raise UsageError(f"A context has {step} to {most} tokens, in steps of {step}, not {context:,}.")

    def cells(self) -> list[Cell]:
        """Return the product of all dimensions, in order."""
        socs, releases = self.socs or PLATFORMS, self.releases or CALLABLE
        types, counts = self.types or known_types(), self.cores or (0,)
        size = prod(map(len, (socs, releases, types, self.contexts, self.loras, counts)))
        if size > _MOST_CELLS:
            raise UsageError(f"That is a matrix of {size:,} cells; the limit is {_MOST_CELLS:,}.")
        found = (
            Cell(soc, release, dtype, count or cores(soc, release), context, lora)
            for soc, release, dtype, context, lora, count in product(
                socs, releases, types, self.contexts, self.loras, counts
            )
        )
        return list(dict.fromkeys(found))
