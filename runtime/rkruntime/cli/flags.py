"""Options that the commands of all packages share, and the flags that decide how an error is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial, wraps
from itertools import dropwhile
from typing import Any, Final, TypeVar

import click


class Number(click.FloatRange):
    """A number within bounds; click would accept NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class MayBeEmpty:
    """A type of option that takes an empty value. Others do not: see `refuse_empty_values`."""


class _Text(MayBeEmpty, click.types.StringParamType):
    """A text that may be empty."""


TEXT: Final = _Text()
# A context length; the daemon's setting has the same range.
TOKENS: Final = click.IntRange(32, 1 << 20)


class RenamedOption(click.Option):
    """An option that also accepts its former name, which neither help nor completion shows."""

    def __init__(self, *names: Any, former: str, **options: Any) -> None:
        super().__init__(*names, **options)
        self._former = former

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """See click."""
        super().add_to_parser(parser, ctx)
        parser.add_option(self, [self._former], dest=self.name, action="store", nargs=1)


Decorated = TypeVar("Decorated", bound=Callable[..., object])


@dataclass
class Flags:
    """The flags as parsed by click; the object of the outermost context."""

    debug: bool = False
    json: bool = False


def flag(attribute: str, *names: str, help: str) -> Callable[[Decorated], Decorated]:
    """Return the decorator for a flag that is recorded in `Flags` before any other option is parsed."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> bool:
        flags = context.find_object(Flags)
        if flags is not None:
            setattr(flags, attribute, value)
        return value

    return click.option(*names, is_flag=True, is_eager=True, callback=remember, help=help)


def json_option(help: str = "Print the result as one JSON document.") -> Callable[[Decorated], Decorated]:
    """Add `--json` as the parameter `as_json`. The command's errors, including wrong values, are then JSON as well."""
    return flag("json", "--json", "as_json", help=help)


def quiet_option(help: str = "Show no progress.") -> Callable[[Decorated], Decorated]:
    """Add `-q` as the parameter `quiet`."""
    return click.option("-q", "--quiet", is_flag=True, help=help)


def asks_for_json(command: click.Command, words: Sequence[str]) -> bool:
    """Whether a command line has `--json`, if click refused the line and so did not record its flags.

    click's own parser reads the line again and skips unknown options. If there is no such command, or its module
    cannot be imported, options cannot be told from their values; then any `--json` counts.
    """
    context = click.Context(command, resilient_parsing=True, ignore_unknown_options=True)
    given, rest, _ = command.make_parser(context).parse_args(list(words))
    if given.get("as_json") or not isinstance(command, click.Group):
        return bool(given.get("as_json"))
    name, *others = [*dropwhile(lambda word: word.startswith("-"), rest), ""]
    try:
        subcommand = command.get_command(context, name)
    except Exception:  # the error has already been reported, whatever it was
        subcommand = None
    return asks_for_json(subcommand, others) if subcommand else "--json" in others


def refuse_empty_values(command: click.Command) -> None:
    """Let a command, and those in it, refuse an empty value of an argument or option, unless it may be empty.

    An empty path would be the current folder: what a shell makes of a variable that is not set.
    """
    for item in command.params:
        if not isinstance(item.type, MayBeEmpty | click.types.UnprocessedParamType):
            item.type_cast_value = partial(_cast, item, item.type_cast_value)  # type: ignore[method-assign]
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        refuse_empty_values(inner)


def _cast(item: click.Parameter, cast: Callable[[click.Context, Any], Any], ctx: click.Context, value: Any) -> Any:
    given = item.name and ctx.get_parameter_source(item.name) is click.core.ParameterSource.COMMANDLINE
    if given and (value == "" or (isinstance(value, list | tuple) and "" in value)):
        here = " The current folder is a dot." if isinstance(item.type, click.Path) and item.type.dir_okay else ""
        raise click.BadParameter(f"it is empty.{here}", ctx, item)
    return cast(ctx, value)


def packed(
    name: str, kind: Any, *options: Callable[[Any], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that passes these options to a command as one argument `name`, a dataclass `kind`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(**{name: kind(**{item.name: given.pop(item.name) for item in fields(kind)})}, **given)

        result: Callable[..., None] = run
        for option in reversed(options):
            result = option(result)
        return result

    return decorate
