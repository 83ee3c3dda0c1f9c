"""`rkedge list`: the bundles that commands find by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rkruntime.cli.flags import json_option
from rkruntime.errors import BundleError
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json


def _row(name: str, path: Path) -> dict[str, Any]:
    from rkruntime.bundle.manifest import open_bundle

    row: dict[str, Any] = {"name": name, "path": str(path.absolute())}
    try:
        made = open_bundle(path).manifest
    except BundleError as error:
        return {**row, "error": error.message}
    made_for = f"{made.platform} {made.dtype} {made.toolkit_version}"
    return {**row, "size": made.size_bytes, "made_for": made_for, "target": made.target}


def _print(rows: list[dict[str, Any]]) -> None:
    texts = [
        (row["name"], *(("damaged", "") if "error" in row else (row["made_for"], f"{row['size'] / 1e6:,.0f} MB")))
        for row in rows
    ]
    width, wider = (max(len(one_line(text[column])) for text in texts) for column in (0, 1))
    for (name, made_for, size), row in zip(texts, rows, strict=True):
        say(f"{one_line(name):{width}}  {made_for:{wider}}  {size:>9}  {one_line(row['path'])}")


@click.command("list")
@json_option()
def run(as_json: bool) -> None:
    """List the bundles that can be named without a path.

    They are looked for in the current folder, in ~/.local/share/rkedge/bundles, and among those of `rkedge demo`.
    A part such as -rk3588-w8a8-1.2.3 at the end of a name need not be typed.
    """
    from rkruntime.bundle.names import named_bundles, own_bundles

    rows = [_row(name, path) for name, path in named_bundles().items()]
    if as_json:
        say_json(rows)
    elif rows:
        _print(rows)
    else:
        say(f"There are no bundles here, nor in {own_bundles()}. `rkedge demo` makes two to try.", err=True)
