"""Convert a model to several types, one after the other; each bundle can be tried on a board as soon as it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final

from rkconvert.compat.case import Wanted
from rkconvert.conversion.convert import Options, target_of
from rkconvert.conversion.matrix import Cell, CellResult, distinct, folders, run
from rkconvert.progress import Reporter
from rkconvert.rules.quantized_types import EMULATOR_ONLY, accepted
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import UsageError

_SOC: Final = "rk3588"
# The start of the types that the emulator computes.
_EMULATED: Final = "w8a8"


def variants(
    checkpoint: str,
    revision: str | None,
    wanted: Wanted,
    target: str,
    folder: Path,
    reporter: Reporter,
    after: Callable[[Bundle], None],
) -> list[CellResult]:
    """Convert each wanted cell, or take it from `folder`; return all outcomes, also those of refused conversions.

    Args:
        wanted: Without releases, the toolkit's own is used; without types, all that it takes for the SoC.
        after: Called with each bundle.

    Raises:
        UsageError: An adapter beside the model is wanted, and there is none.
        HostError: The toolkit is missing.
    """
    if "runtime" in wanted.loras:
        raise UsageError("There is no adapter to convert.", hint="Convert it with rkedge convert, and name its bundle.")
    name = Path(checkpoint).resolve().name.removesuffix(".gguf")
    base = Options(
        checkpoint=checkpoint,
        output=folder,
        revision=revision,
        target=target,
        force_dtype=True,
        selftest=True,
        references=True,
    )
    releases = wanted.releases or (target_of(base).release,)
    cells = [
        Cell(
            f"{dtype} on {soc} with {release}",
            replace(
                base,
                output=folder / f"{name}-{soc}-{dtype}-{release}",
                platform=soc,
                dtype=dtype,
                release=release,
                max_context=context,
                npu_cores=count or None,
            ),
        )
        for soc, release, context, count in product(
            wanted.socs or (_SOC,), releases, wanted.contexts, wanted.cores or (0,)
        )
        for dtype in wanted.types or _types(target, soc, release)
    ]
    with folders(cells):
        return run(distinct(cells), reporter, lambda _, bundle: after(bundle))


def _types(target: str, soc: str, release: str) -> list[str]:
    every = [dtype for dtype in accepted(soc, release) if dtype not in EMULATOR_ONLY]
    return [dtype for dtype in every if target == "toolkit" or dtype.startswith(_EMULATED)]
