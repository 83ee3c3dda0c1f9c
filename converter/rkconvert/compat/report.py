"""The matrix as JSON, as Markdown, and in the terminal: tables of types by releases, readable without color."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final

from rich.console import Console  # noqa: TID251 - the name of a type
from rich.table import Table
from rich.text import Text

from rkconvert.compat.cells import TRUST, Cell, Evidence, Judged, Status
from rkconvert.compat.matrix import Matrix
from rkconvert.output.markdown import plain
from rkconvert.plan.report import weights
from rkruntime.printable import one_line
from rkruntime.versions import version

SCHEMA: Final = "rkedge-compat-matrix/1"
WORDS: Final = {
    Status.WORKS: "works",
    Status.SLOWER: "slower",
    Status.REFUSED: "refused",
    Status.FAILS: "fails",
    Status.WRONG: "wrong",
    Status.UNKNOWN: "unknown",
}
_COLOURS: Final = {
    Status.WORKS: "green",
    Status.SLOWER: "yellow",
    Status.REFUSED: "red dim",
    Status.FAILS: "red",
    Status.WRONG: "magenta",
    Status.UNKNOWN: "dim",
}
LETTERS: Final = dict(zip(TRUST, "BFTREP", strict=True))
DISPUTED: Final = "!"


@dataclass(frozen=True)
class Section:
    """The cells of one SoC, number of cores, context and kind of adapter: a row for each type, a column a release."""

    title: str
    releases: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Judged, ...]], ...]


def sections(matrix: Matrix) -> Iterator[Section]:
    """Cut the matrix into tables."""

    def table(item: Judged) -> tuple[str, int, int, str]:
        return item.cell.soc, item.cell.cores, item.cell.context, item.cell.lora

    order = {id(item): number for number, item in enumerate(matrix.cells)}
    for (soc, cores, context, lora), found in groupby(sorted(matrix.cells, key=table, reverse=True), table):
        cells = sorted(found, key=lambda item: order[id(item)])
        releases = sorted({item.cell.release for item in cells}, key=version)
        types = dict.fromkeys(item.cell.type for item in cells)
        by_place = {(item.cell.type, item.cell.release): item for item in cells}
        adapter = "" if lora == "merged" else ", adapter beside the model"
        yield Section(
            f"{soc}, {cores} NPU cores, {context:,} tokens of context{adapter}",
            tuple(releases),
            tuple((name, tuple(by_place[name, release] for release in releases)) for name in types),
        )


def short(item: Judged) -> str:
    """Return a cell in a word, with the letter of its evidence, and a mark if a source disagrees."""
    letter = LETTERS[item.level] if item.level else ""
    return " ".join(filter(None, [WORDS[item.status], letter + (DISPUTED if item.disputed else "")]))


def legend() -> str:
    """Return a line that says what the letters mean."""
    letters = ", ".join(f"{letter} {level.value}" for level, letter in LETTERS.items())
    return f"{letters}; {DISPUTED} another source disagrees"


def as_dict(matrix: Matrix) -> dict[str, Any]:
    """Return the matrix as `--json` prints it."""
    return {
        "schema": SCHEMA,
        "model": {"name": matrix.case.source.name, "digest": matrix.case.digest},
        "cells": [
            {
                **asdict(item.cell),
                "status": item.status.value,
                "level": item.level and item.level.value,
                "disputed": bool(item.disputed),
                "evidence": [_evidence(piece) for piece in item.evidence],
            }
            for item in matrix.cells
        ],
    }


def _evidence(piece: Evidence) -> dict[str, Any]:
    return {**asdict(piece), "status": piece.status.value, "level": piece.level.value}


def show(matrix: Matrix, console: Console, *, why: bool) -> None:
    """Print the tables, and with `why` the evidence on each cell."""
    shape = matrix.case.shape
    console.print(Text(f"{matrix.case.source.name}: {shape.family}, {weights(shape.parameters)}"))
    for section in sections(matrix):
        table = Table(title=f"\n{section.title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("")
        columns = _alike(section)
        for first, last in columns:
            table.add_column(first if first == last else f"{first} to {last}")
        shown = [section.releases.index(first) for first, _ in columns]
        for name, cells in section.rows:
            table.add_row(Text(name), *(Text(short(cells[at]), _COLOURS[cells[at].status]) for at in shown))
        console.print(table)
    console.print(Text(f"\n{legend()}", "dim"))
    if not why:
        console.print("--why shows the evidence on each cell.", style="dim")
    for item in matrix.cells if why else ():
        console.print(Text.assemble("\n", (_place(item.cell), "bold"), f": {item.status.value}"))
        for piece in item.evidence:
            against = " (disagrees)" if piece in item.disputed else ""
            console.print(Text(f"  {piece.level.value}{against}: {one_line(piece.says)} [{one_line(piece.source)}]"))
            for line in piece.log:
                console.print(Text(f"    {one_line(line)}", "dim"))


def _alike(section: Section) -> list[tuple[str, str]]:
    """Return the first and last release of each run of columns with the same words in every row."""
    columns = zip(section.releases, zip(*(cells for _, cells in section.rows), strict=True), strict=True)
    groups = groupby(columns, lambda column: [short(item) for item in column[1]])
    spans = [[release for release, _ in group] for _, group in groups]
    return [(span[0], span[-1]) for span in spans]


def _place(cell: Cell) -> str:
    return f"{cell.type} on {cell.soc}, {cell.release}, {cell.cores} cores, {cell.context} tokens, LoRA {cell.lora}"


def markdown(matrix: Matrix) -> str:
    """Return the tables as Markdown, below each one the evidence in words, with equal cells together."""
    parts = [f"# {plain(matrix.case.source.name)}\n", f"{legend()}.\n"]
    for section in sections(matrix):
        parts += [f"## {section.title}\n", _table(section), *_reasons(section), ""]
    return "\n".join(parts)


def _table(section: Section) -> str:
    head = f"| type | {' | '.join(section.releases)} |\n|---|{'---|' * len(section.releases)}"
    rows = [f"| {name} | {' | '.join(short(item) for item in cells)} |" for name, cells in section.rows]
    return "\n".join([head, *rows]) + "\n"


def _reasons(section: Section) -> Iterator[str]:
    for name, cells in section.rows:
        found: dict[tuple[str, str, str], list[str]] = {}
        for item in cells:
            for piece in item.evidence:
                found.setdefault((piece.level.value, piece.says, piece.source), []).append(item.cell.release)
        yield f"* `{name}`"
        for (level, says, source), releases in found.items():
            yield f"    * {_spans(releases, section.releases)}, {level}: {plain(says)} {plain(source)}"


def _spans(releases: Sequence[str], every: Sequence[str]) -> str:
    if len(releases) == len(every):
        return "all releases" if len(every) > 1 else every[0]
    return ", ".join(releases)
