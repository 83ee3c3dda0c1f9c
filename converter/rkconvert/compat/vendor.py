"""What the vendor says: what its toolkit takes, by release, and its figures for this very model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rkconvert.compat.case import Case
from rkconvert.compat.cells import AS_FAST, Cell, Evidence, Level, Status
from rkconvert.model.groups import SOURCE as GROUP_SOURCE
from rkconvert.model.groups import misfit
from rkconvert.plan.prediction import Benchmark, own_rows
from rkconvert.rules.quantized_types import accepted, known_types
from rkconvert.rules.releases import ToolkitRelease, addresses, release
from rkconvert.rules.type_names import parse_type

_REPOSITORY: Final = "https://github.com/airockchip/rknn-llm"


def toolkit(case: Case, cell: Cell) -> Iterator[Evidence]:
    """Yield why the toolkit's manuals exclude a cell; nothing if they do not."""
    if found := _excluded(case, cell, release(cell.release)):
        yield Evidence(Status.REFUSED, Level.TOOL, f"{found[0]}.", found[1])


def _excluded(case: Case, cell: Cell, row: ToolkitRelease) -> tuple[str, str] | None:
    """Return why a cell is excluded, and where the vendor says so."""

    def source(field: str) -> str:
        return addresses(row.source(field))

    taken = accepted(cell.soc, cell.release)
    if cell.type not in taken:
        return (
            f"The toolkit {cell.release} takes only {', '.join(taken)} for {cell.soc}",
            source("dtypes"),
        )
    if cell.cores > row.cores[cell.soc]:
        return f"{cell.soc} has {row.cores[cell.soc]} NPU cores", source("cores")
    if cell.context > row.context["most"]:
        most = row.context["most"]
        return (
            f"The toolkit {cell.release} makes files for at most {most:,} tokens",
            source("context"),
        )
    if cell.context > case.shape.max_position_embeddings:
        return f"The model was made for at most {case.shape.max_position_embeddings:,} tokens", "its config.json"
    if found := misfit(case.shape, parse_type(cell.type)):
        return found.sentence, GROUP_SOURCE
    return None


def figures(case: Case, cell: Cell) -> Iterator[Evidence]:
    """Yield the vendor's figure for this model, type, SoC and release: it is for all cores and without an adapter."""
    row = _row(case, cell, cell.type)
    if row is None or cell.lora != "merged" or cell.cores != release(cell.release).cores[cell.soc]:
        return
    others = [found for name in known_types() if (found := _row(case, cell, name))]
    best = max(others, key=lambda found: found.decode_tokens_per_s)
    slower = row.decode_tokens_per_s < AS_FAST * best.decode_tokens_per_s
    beside = f", against {best.decode_tokens_per_s:.2f} with {best.kind.name}" if slower else ""
    yield Evidence(
        Status.SLOWER if slower else Status.WORKS,
        Level.FIGURE,
        f"{row.decode_tokens_per_s:.2f} tokens/s{beside}, in {row.memory_mb:,.0f} MiB, with"
        f" {row.prompt_tokens + row.new_tokens} tokens of context.",
        f"{_REPOSITORY}/blob/{_file(cell.release)}",
    )


def _row(case: Case, cell: Cell, dtype: str) -> Benchmark | None:
    return own_rows(cell.soc, parse_type(dtype), case.shape).get(cell.release)


def _file(version: str) -> str:
    # README.md of 1.1.1 says that its figures were measured with 1.1.0.
    return "release-v1.1.1/README.md" if version == "1.1.0" else f"release-v{version}/benchmark.md"
