"""The pages: their links lead somewhere, and they name what the code reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), target


def test_every_page_can_be_found() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []


def test_every_variable_is_named() -> None:
    sources = [
        *(ROOT / "runtime").rglob("*.py"), *(ROOT / "converter").rglob("*.py"), *(ROOT / "board").rglob("*.py"),
        *(ROOT / "board" / "emulator").glob("*.cc"),
    ]  # fmt: skip
    read = {
        name
        for source in sources
        for name in re.findall(r"[\"'](RK(?:EDGE|EMU)_(?!HAVE)[A-Z_]+)[\"']", source.read_text())
    }
    assert {"RKEDGE_LIBRARY", "RKEMU_FAULT"} <= read
    page = (ROOT / "docs" / "environment.md").read_text()
    assert {name for name in read if f"`{name}`" not in page} == set()
