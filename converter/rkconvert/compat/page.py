"""The matrix as one HTML file without external resources."""

from __future__ import annotations

from pathlib import Path

from rkconvert.compat.cells import Judged
from rkconvert.compat.matrix import Matrix
from rkconvert.compat.report import legend, sections, short
from rkconvert.output.html import page_template
from rkruntime.files import atomic_file


def write(matrix: Matrix, path: Path) -> None:
    """Write the page. Raises OutputError or HostError if it cannot be written."""
    page = render(matrix)
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render(matrix: Matrix) -> str:
    """Return the page as HTML text. Texts of result files are escaped."""
    template = page_template("rkconvert.compat", short=short, told=_told)
    return template.render(matrix=matrix, sections=list(sections(matrix)), legend=legend())


def _told(item: Judged) -> str:
    """Return all evidence on a cell as text, for the cell's tooltip."""
    return "\n".join(f"{piece.level.value}: {piece.says} [{piece.source}]" for piece in item.evidence) or "no evidence"
