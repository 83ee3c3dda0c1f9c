"""The matrices of Google's three Gemma 2 models, for the releases at which something changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rkconvert.compat.case import Case, Wanted
from rkconvert.compat.emulated import EmulatedLoads
from rkconvert.compat.matrix import Matrix, fill
from rkconvert.plan import ModelSource

CONFIGS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "gemma_configs.json").read_text())
MODELS = ("gemma-2-2b-it", "gemma-2-9b-it", "gemma-2-27b-it")
RELEASES = ("1.1.0", "1.1.1", "1.2.0", "1.2.3", "1.3.0")


def case_of(name: str) -> Case:
    return Case.of(ModelSource(name, CONFIGS[name]))


def matrix_of(name: str, **wanted: Any) -> Matrix:
    """With loads in the emulator."""
    case = case_of(name)
    return fill(case, Wanted(**wanted).cells(), [EmulatedLoads(case, lambda line: None)])


def matrices() -> Iterator[Matrix]:
    for name in MODELS:
        yield matrix_of(name, releases=RELEASES)
