"""Options that several commands share, and the progress that users see while a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args

import click
from click.shell_completion import CompletionItem

from rkruntime.cli.flags import TOKENS, Number, RenamedOption, packed
from rkruntime.engine.open import LIBRARY, LIBRARY_VARIABLE, RuntimeOptions, SamplingOptions, load_engine
from rkruntime.printable import one_line
from rkruntime.schema import types_of
from rkruntime.stop import Stop
from rkruntime.terminal import say

if TYPE_CHECKING:
    from rkruntime.bundle.manifest import Bundle
    from rkruntime.checks.preflight import Finding
    from rkruntime.engine.engine import Engine
    from rkruntime.model import Model

Command: TypeAlias = Callable[..., None]


class BundleName(click.ParamType):  # type: ignore[type-arg]  # it takes none in earlier releases of click
    """A bundle by its name or path, as a Path; see `find_bundle`.

    Args:
        what: What the argument may be, for messages.
        hint: What else to try, for messages.
    """

    name = "bundle"

    def __init__(self, what: str = "bundle", hint: str = "") -> None:
        self._what, self.hint = what, hint

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See click."""
        from rkruntime.bundle.names import find_bundle

        return value if isinstance(value, Path) else find_bundle(value, self._what, self.hint)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """See click. Names come first; paths only if no name fits."""
        from rkruntime.bundle.names import named_bundles

        names = [name for name in named_bundles() if name.startswith(incomplete)]
        return [CompletionItem(name) for name in names] or click.Path().shell_complete(ctx, param, incomplete)


def bundle_argument(**options: Any) -> Callable[[Any], Any]:
    """Add the argument BUNDLE as the parameter `bundle`."""
    return click.argument("bundle", metavar="BUNDLE", type=BundleName(), **options)


runtime_options = packed(
    "runtime",
    RuntimeOptions,
    click.option(
        "--library",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar=LIBRARY_VARIABLE,
        show_envvar=True,
        show_default="the emulator for its bundles, else searched for",
        help=f"Load this {LIBRARY}.",
    ),
    click.option(
        "--release",
        cls=RenamedOption,
        former="--abi",
        metavar="RELEASE",
        show_default="what the library says it is",
        help="Treat the library as this RKLLM release.",
    ),
    click.option(
        "--max-context",
        type=TOKENS,
        metavar="TOKENS",
        show_default="the model's limit",
        help="Set the context length.",
    ),
    click.option("--force", is_flag=True, help="Load the model even if it is known not to work on this board."),
    click.option(
        "--base-domain-id",
        type=click.IntRange(0, 15),
        metavar="NUMBER",
        show_default="0",
        help="Use this memory domain of the NPU, if other models use the first ones.",
    ),
)

# Display settings of options whose names and types do not say enough.
_SHOWN: Final[Mapping[str, Any]] = {
    "max_new_tokens": {"metavar": "TOKENS", "show_default": "what the context has room for"},
}


def _number(name: str, kind: Any) -> Callable[[Any], Any]:
    """Make the option for a number that may be None; its type has the range and the help."""
    number, bounds, text = get_args(get_args(kind)[0])
    allowed = click.IntRange if number is int else Number
    type_ = allowed(bounds.least, bounds.most)
    return click.option(f"--{name.replace('_', '-')}", type=type_, help=text, **_SHOWN.get(name, {}))


sampling_options = packed(
    "sampling", SamplingOptions, *(_number(name, kind) for name, kind in types_of(SamplingOptions).items())
)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows each text in the same line of the terminal; without one, it shows nothing."""
    watched = sys.stderr.isatty()

    def show(text: str) -> None:
        if watched:
            say(one_line(text), lead="\r\x1b[K", nl=False, err=True)

    try:
        yield show
    finally:
        show("")


def show_finding(finding: Finding) -> None:
    """Show a preflight finding on standard error."""
    color = "yellow" if finding.level == "warning" else "cyan"
    say(f"{finding.message} {finding.hint}", lead=click.style(f"{finding.level}: ", fg=color), err=True)


def open_engine(
    bundle: Bundle, options: RuntimeOptions, sampling: SamplingOptions, *, stop: Stop | None = None
) -> Engine:
    """Call `load_engine`, showing findings and progress on standard error."""
    with progress_line() as progress:
        return load_engine(bundle, options, sampling, show_finding, progress, stop)


def open_for_person(bundle: Bundle, options: RuntimeOptions, sampling: SamplingOptions) -> Model:
    """Call `open_model`, showing findings and progress on standard error."""
    from rkruntime.model import open_model

    with progress_line() as progress:
        model = open_model(bundle, options, sampling, finding=show_finding, progress=progress)
    if model.engine.info.emulated and sys.stderr.isatty():
        say(f"emulated runtime {model.engine.info.release}: no speed here is a board's", err=True, dim=True)
    return model
