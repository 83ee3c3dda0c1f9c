"""The pages that the code writes: `python -m tests.pages` brings them up to date, and a test compares them."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from tests.converter.compat.gemma2 import matrices as gemma2_matrices

from rkboard.doctor.checks import GROUPS, code_of
from rkconvert.compat import report as compat
from rkconvert.compat.matrix import Matrix
from rkruntime import cli, errors
from rkruntime.schema import Between
from rkruntime.serve.settings import Settings, how_taken

DOCS = Path(__file__).parents[1] / "docs"
_NOTE = "<!-- Written by `python -m tests.pages`; do not edit. -->"


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, by what is typed for them."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, f"{path} {name}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _section(path: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    yield f"\n## {path}\n\n    {' '.join([path, *command.collect_usage_pieces(context)])}\n"
    yield inspect.cleandoc(command.help or "")
    if isinstance(command, click.Group):
        found = {name: command.get_command(context, name) for name in command.list_commands(context)}
        links = (f"[{name}](#{f'{path} {name}'.replace(' ', '-')})" for name, item in found.items() if item)
        yield f"\nIts commands: {', '.join(links)}."
    options = (item for item in command.params if isinstance(item, click.Option))
    records = [record for item in options if (record := item.get_help_record(context))]
    if records:
        yield "\n| option | |\n|---|---|"
        yield from (f"| `{_cell(names)}` | {_cell(text)} |" for names, text in records)


def commands_page() -> str:
    """docs/commands.md."""
    lines = [
        "# Which commands and options are there?",
        f"\n{_NOTE}\n",
        "Every command prints this with `--help`. An error is a message and a hint on standard error, and\n"
        "with `--json` also an object on standard output; `rkedge --debug COMMAND ...` shows its traceback first.",
        "\n| exit status | meaning |\n|---|---|",
        *(f"| {code} | {text} |" for code, text in _exits()),
    ]
    for path, command in commands(cli.cli, "rkedge"):
        lines += _section(path, command)
    return "\n".join(lines) + "\n"


def _exits() -> list[tuple[str, str]]:
    """The exit statuses: those of the error tree, and those that have no error."""
    tree = re.findall(r"^ *[├└]── (\w+) +(\d) +(.*)$", errors.__doc__ or "", re.MULTILINE)
    return [
        ("0", "success"),
        ("1", "a defect of rkedge"),
        *((status, f"`{name}`: {text}") for name, status, text in tree),
        ("130", "stopped with Ctrl-C"),
        ("141", "the reader of the output, such as `head`, has gone"),
    ]


def _words(kind: type[Any]) -> dict[str, str]:
    """What a dataclass's docstring says of each attribute."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n     .*)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}


def _range(hint: Any) -> str:
    """What a value may be."""
    if hasattr(hint, "__metadata__"):
        bounds = next((item for item in hint.__metadata__ if isinstance(item, Between)), None)
        return f"{_number(bounds.least)} to {_number(bounds.most)}" if bounds else _range(hint.__origin__)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    parts = [part for part in get_args(hint) if part is not type(None)]
    if parts:
        return _range(parts[0])
    return {bool: "`true`, `false`", Path: "a path", str: "a text", int: "a whole number"}[hint]


def _number(value: float) -> str:
    return f"{value:,f}".rstrip("0").rstrip(".")


def _settings(kind: type[Any], prefix: str = "") -> Iterator[str]:
    hints, words = typing.get_type_hints(kind, include_extras=True), _words(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from _settings(typing.cast("type[Any]", hint), f"{item.name}.")
            continue
        value = item.default
        default = "null" if value is None else _number(value) if isinstance(value, float) else str(value).lower()
        name = f"{prefix}{item.name}"
        yield f"| `{name}` | {default} | {_range(hint)} | {how_taken(name)} | {_cell(words[item.name])} |"


def settings_page() -> str:
    """docs/settings.md."""
    lines = [
        "# Which settings does the daemon have?",
        f"\n{_NOTE}\n",
        "`rkedge serve --config FILE` reads them from a YAML file; `configs/daemon.yaml` is one with all\n"
        "defaults. A name with a dot is a key within a mapping: `limits.queue` is `queue` below `limits`. After\n"
        "`systemctl reload rkedge` a changed setting takes effect at once (`now`), by loading the model again\n"
        "(`load`), with the next load, or only after a restart. Sizes are in MB, times in seconds.",
        "\n| setting | default | values | takes effect | meaning |\n|---|---|---|---|---|",
        *_settings(Settings),
    ]
    return "\n".join(lines) + "\n"


def checks_page() -> str:
    """docs/checks.md."""
    lines = [
        "# What does the doctor look at?",
        f"\n{_NOTE}\n",
        "`rkedge doctor` makes these checks; [doctor](doctor.md) says how to read its findings. A check says nothing\n"
        "where its question does not arise: those on a bundle need `--bundle`.",
    ]
    for group, checks in GROUPS.items():
        lines += [f"\n## {group[0].upper()}{group[1:]}\n\n| check | |\n|---|---|"]
        lines += [f"| `{code_of(check)}` | {_cell(check.__doc__ or '')} |" for check in checks]
    return "\n".join(lines) + "\n"


def matrix_page(matrices: Iterable[Matrix]) -> str:
    """docs/matrix.md, from the matrices of several models with the same dimensions."""
    head = [
        "# Which type of Gemma 2 runs on which board?",
        f"\n{_NOTE}\n",
        "Made by `rkedge compat` for the releases at which something changes; [compat](compat.md) says what the words",
        "and letters mean. Nothing here was measured on a board by RKEdge.\n",
    ]
    parts = [f"\n{compat.markdown(matrix)}".replace("\n#", "\n##") for matrix in matrices]
    return "\n".join(head) + "".join(parts)


PAGES = {"checks.md": checks_page, "commands.md": commands_page, "settings.md": settings_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    (DOCS / "matrix.md").write_text(matrix_page(gemma2_matrices()))
