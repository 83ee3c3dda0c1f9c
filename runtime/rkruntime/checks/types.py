"""Which quantized types the toolkit offers for which SoC: the table data/types.yaml."""

from __future__ import annotations

from collections.abc import Mapping

from rkruntime import resources
from rkruntime.versions import Version, version


def types_by_soc(release: Version | None = None) -> tuple[Mapping[str, tuple[str, ...]], str]:
    """Return the types that a release (by default the newest) offers by SoC, and the source of the last change."""
    rows = [row for row in resources.table("types") if release is None or version(row["from"]) <= release]
    found = {soc: tuple(types) for row in rows for soc, types in row["types"].items()}
    return found, rows[-1]["source"]
