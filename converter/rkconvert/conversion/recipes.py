"""Recipes: options of a command in a YAML file, so that a conversion can be kept, shared and repeated.

The keys are the command's own options: `--max-context` is `max_context`. There is no second list of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import click

from rkconvert.adapters.merged_model import AdapterSource
from rkconvert.sources.hub import is_hub_id
from rkruntime.errors import UsageError
from rkruntime.resources import resource
from rkruntime.schema import Length, build
from rkruntime.yamltext import read_mapping

_SHIPPED: Final = "gemma-*.yaml"
# As on the command line, no value is empty.
_TEXT: Final = Annotated[str, Length(1 << 14, least=1)]
# Values that name a folder, a file or a model on the hub.
_SOURCES: Final = ("checkpoint", "lora")
_KINDS: Final[dict[type[click.ParamType[Any]], Any]] = {
    click.types.IntParamType: int,
    click.types.FloatParamType: float,
    click.types.BoolParamType: bool,
    click.Path: Path,
}


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """Return what a command's recipe may set: the arguments, and every option but the one that names a recipe."""
    found = {_key(item): item for item in command.params}
    return {key: item for key, item in found.items() if item.expose_value and key != "matrix"}


def _key(item: click.Parameter) -> str:
    """Return the key of a parameter: `max_context` for `--max-context`; the longest of several names."""
    return max(item.opts, key=len).lstrip("-").replace("-", "_")


def option(name: str = "--recipe") -> Callable[[Any], Any]:
    """Return the option that takes a recipe. Options on the command line override the recipe's."""

    def use(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            path = find(value)
            fail = failure(path)
            values = resolve(read_mapping(path, fail), context.command, path)
            if not values:
                raise fail("it gives no option")
            context.default_map = {**(context.default_map or {}), **values}

    return click.option(
        name,
        callback=use,
        expose_value=False,
        is_eager=True,
        metavar="FILE",
        help="Read options from a recipe: a file, or the name of one that RKEdge ships. The command line overrides it.",
    )


def shipped() -> dict[str, Path]:
    """Return the recipes in configs/ by name."""
    return {path.stem: path for path in sorted(resource("configs").glob(_SHIPPED))}


def find(name: str) -> Path:
    """Return the path of a recipe, given as a path or as the name of a shipped one. Raises UsageError."""
    path, names = Path(name), shipped()
    if path.is_file() or name not in names:
        if path.suffix in (".yaml", ".yml") or path.exists():
            return path
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"There is no recipe {name!r}.", hint=f"{guess}Name a .yaml file, or one of {', '.join(names)}."
        )
    return names[name]


def failure(path: Path) -> Callable[[str], UsageError]:
    """Return a function that makes the errors of a recipe."""
    return lambda what: UsageError(f"The recipe {path}: {what}.", hint="See docs/recipes.md for the keys.")


def resolve(content: Mapping[str, Any], command: click.Command, path: Path) -> dict[str, Any]:
    """Return a recipe's content as parameter values by name; relative paths start at the recipe's folder.

    Args:
        content: Content of the file at `path`.

    Raises:
        UsageError: A key is not an option, or a value has the wrong type.
    """
    options = keys(command)
    kinds = [(key, kind_of(item) | None, field(default=None)) for key, item in options.items()]
    values = asdict(build(make_dataclass("Recipe", kinds), content, failure(path)))
    given = {key: value for key, value in values.items() if value is not None}
    return {str(options[key].name): _located(key, value, path.parent) for key, value in given.items()}


def kind_of(item: click.Parameter) -> Any:
    """Return the type of a parameter's value in a recipe, for `rkruntime.schema`."""
    if isinstance(item.type, click.Choice):
        kind: Any = Literal[tuple(item.type.choices)]
    else:
        kind = next((kind for of, kind in _KINDS.items() if isinstance(item.type, of)), _TEXT)
    return tuple[kind, ...] if item.multiple else kind


def _located(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, tuple):
        return [_located(key, part, folder) for part in value]
    if isinstance(value, Path):
        return folder / value
    if key in _SOURCES:
        source = AdapterSource.parse(value).source
        return value if is_hub_id(source) and not (folder / source).exists() else str(folder / value)
    return value
