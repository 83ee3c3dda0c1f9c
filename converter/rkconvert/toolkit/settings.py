"""The tokens and the context that the toolkit's log says it puts into the file, beside those that were asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from rkconvert.rules.releases import ToolkitRelease
from rkconvert.target import ModelSpec

_VALUE: Final = re.compile(r"-?\w+")


@dataclass(frozen=True)
class Setting:
    """One setting of the file.

    Attributes:
        asked: Values that are right, as the log writes them.
        said: What the log says; empty if it says nothing.
    """

    name: str
    asked: tuple[str, ...]
    said: str

    @property
    def differs(self) -> bool:
        """Whether the log names a value that nobody asked for."""
        return not set(_VALUE.findall(self.said)) <= set(self.asked)

    def __str__(self) -> str:
        return f"it set {self.name} to {self.said}, but {' or '.join(self.asked)} was asked for"

    def as_dict(self) -> dict[str, Any]:
        """Return the setting as JSON types."""
        return {**asdict(self), "asked": list(self.asked)}


def settings(said: Mapping[str, str], spec: ModelSpec, release: ToolkitRelease) -> tuple[Setting, ...]:
    """Compare what the log said, by name, with what was asked for; see `Output.settings`."""
    return tuple(Setting(name, asked, said.get(name, "")) for name, asked in _asked(spec, release))


def _asked(spec: ModelSpec, release: ToolkitRelease) -> Iterator[tuple[str, tuple[str, ...]]]:
    # A release that stores one end token may take it from the tokenizer's settings: any of them is right.
    yield "token_id of bos", (str(spec.config.bos_token_id),)
    yield "token_id of eos", tuple(map(str, spec.model.checkpoint.eos_token_ids))
    yield "add_bos_token", ("True",)
    yield "add_eos_token", ("False",)
    own = release.takes("build", "max_context")
    yield "max_context_limit", (str(spec.max_context if own else release.context["most"]),)
