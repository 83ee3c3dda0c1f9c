"""Findings on contents of a bundle that a load ignores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rkruntime.checks.preflight import Finding


def ignored_settings(file: str, names: Iterable[str], read: Iterable[str]) -> Finding:
    """Return the finding for settings in `file` that have no effect; only those in `read` do."""
    return Finding(
        "warning",
        "generation-config",
        f"{file} asks for {', '.join(names)}, which has no effect here.",
        "Answers may differ from those of transformers; use --temperature and the other sampling options instead.",
        f"Only {', '.join(read)} and do_sample are read from it; the manifest has the tokens that end answers.",
    )


def unlisted_files(names: Sequence[str]) -> Finding:
    """Return the finding for files in a bundle's folder that its manifest does not list."""
    return Finding(
        "warning",
        "unlisted-file",
        f"The bundle's folder contains {', '.join(names[:4])}, which its manifest does not list, so it is not loaded.",
        "Remove it, or convert again: the manifest may have been changed.",
        "rkedge.yaml lists every file of a bundle.",
    )
