"""What the self-test tries: what a release promises for a SoC, and what is not known about it yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rkconvert.rules.releases import ToolkitRelease
from rkconvert.rules.type_names import UNQUANTIZED

_USUAL: Final = "w8a8"
TRAINED_HEAD: Final = "a head of its own"
NO_VOCABULARY_FILE: Final = "without tokenizer.model"


@dataclass(frozen=True)
class Case:
    """One conversion.

    Attributes:
        asks: Question to answer, `TRAINED_HEAD` or `NO_VOCABULARY_FILE`; empty for what the release promises.
    """

    dtype: str
    calibrated: bool = False
    adapter: bool = False
    asks: str = ""

    @property
    def name(self) -> str:
        """The case in words."""
        parts = {self.dtype: True, "calibrated": self.calibrated, "adapter in its own file": self.adapter}
        return ", ".join([*(text for text, holds in parts.items() if holds), *([self.asks] if self.asks else [])])


def cases(release: ToolkitRelease, platform: str) -> Iterator[Case]:
    """Yield every type, the usual one and fp16 also with an adapter, and the open questions; the simplest first."""
    types = release.dtypes[platform]
    usual = _USUAL if _USUAL in types else types[0]
    yield Case(usual)
    yield Case(usual, calibrated=True)
    yield Case(usual, adapter=True)
    yield Case(usual, calibrated=True, adapter=True)
    yield from (Case(dtype, calibrated=True) for dtype in types if dtype != usual)
    yield Case(UNQUANTIZED)
    yield Case(UNQUANTIZED, adapter=True)
    yield Case(usual, asks=TRAINED_HEAD)
    yield Case(usual, asks=NO_VOCABULARY_FILE)
