"""`rkedge toolkit`: set up the vendor's rkllm-toolkit in its own environment, and show what it supports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rkconvert.rules.quantized_types import PLATFORMS
from rkconvert.selftest import report as reports
from rkconvert.selftest.cases import cases
from rkconvert.selftest.run import models
from rkconvert.selftest.run import run as run_cases
from rkconvert.toolkit.environment import setup
from rkconvert.toolkit.interpreter import Toolkit, find_toolkit
from rkconvert.toolkit.options import ToolkitOptions, toolkit_options
from rkconvert.toolkit.rknn import RELEASE, setup_rknn
from rkconvert.toolkit.wheel import read_wheel
from rkruntime.cli.flags import json_option, quiet_option
from rkruntime.errors import UsageError
from rkruntime.files import refuse_existing
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json

_PYTHON = click.Path(path_type=Path)


@click.group("toolkit")
def run() -> None:
    """Set up the vendor's rkllm-toolkit, which makes the files that a board runs."""


@run.command("setup")
@click.option("--wheel", "wheel_file", type=_PYTHON, help="Install this wheel, as downloaded from the vendor.")
@click.option(
    "--rknn", is_flag=True, help=f"Install rknn-toolkit2 {RELEASE} from PyPI instead, which tests/rknn measures with."
)
@click.option(
    "--python", type=_PYTHON, show_default="searched for", help="Use this Python, of the version that the wheel is for."
)
@click.option("--replace", is_flag=True, help="Replace an existing environment.")
@json_option()
@quiet_option("Do not show what pip prints.")
def run_setup(
    wheel_file: Path | None, rknn: bool, python: Path | None, replace: bool, as_json: bool, quiet: bool
) -> None:
    """Create an environment for a WHEEL with the right Python and pins; `rkedge convert` finds it by itself."""

    def tell(line: str) -> None:
        if not quiet:
            say(one_line(line), err=True)

    if rknn == (wheel_file is not None):
        raise UsageError("Say what to set up: --wheel FILE or --rknn.", hint="--rknn is for tests only.")
    if wheel_file is None:
        made = setup_rknn(python, tell, replace=replace)
        facts = {"python": str(made), "rknn_toolkit2": RELEASE}
        say_json(facts) if as_json else say(f"rknn-toolkit2 {RELEASE} is ready: {made}")
        return
    toolkit = setup(read_wheel(wheel_file), python, tell, replace=replace)
    if as_json:
        say_json(_facts(toolkit))
    else:
        say(f"rkllm-toolkit {toolkit.version} is ready: {toolkit.python}")


@run.command("info")
@toolkit_options("toolkit_python")
@json_option()
def run_info(toolkit_python: Path | None, as_json: bool) -> None:
    """Say which toolkit `rkedge convert` will use and what that release supports, without running any of it."""
    toolkit = find_toolkit(toolkit_python)
    facts = _facts(toolkit)
    if as_json:
        say_json(facts)
        return
    release = toolkit.release
    lines = [
        ("toolkit", f"{toolkit.version}, by {toolkit.origin}"),
        ("python", f"{toolkit.python_version}, {toolkit.python}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in toolkit.parts.items() if version) or "none"),
        *(
            (platform, f"{', '.join(types)}; {release.cores[platform]} NPU cores")
            for platform, types in release.dtypes.items()
        ),
        ("algorithms", ", ".join(release.algorithms) + (", and with _rN" if release.low_rank else "")),
        ("context", f"up to {release.context['most']:,} tokens, in steps of {release.context['step']}"),
        ("load types", ", ".join(release.load_dtypes) or "its own choice"),
        ("end tokens", "several" if release.several_eos else "one; the runtime of RKEdge ends answers at all of them"),
    ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        say(f"{name:{width}}  {text}")


@run.command("selftest")
@click.option(
    "--platform", type=click.Choice(sorted(PLATFORMS)), default="rk3588", show_default=True, help="Test for this SoC."
)
@toolkit_options("toolkit_python", "toolkit_device", "toolkit_load_dtype", "toolkit_patience", toolkit_patience=120.0)
@click.option(
    "-o",
    "--output",
    type=_PYTHON,
    show_default="beside the toolkit's logs",
    help="Write the report, to keep or to send, to this file.",
)
@json_option()
@quiet_option("Print only the summary.")
@click.pass_context
def run_selftest(
    context: click.Context, /, platform: str, output: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Convert a tiny random Gemma 2 in every way that the installed release promises: does this installation work?

    It should take about two minutes. The exit status is 0 only if all of that worked; questions that nobody has
    answered yet are answered beside it, whatever the answer is.
    """
    toolkit = find_toolkit(options["toolkit_python"])
    if output is not None:
        refuse_existing(output)
    path, report = output or reports.default_file(), reports.Report(toolkit, platform)

    def tell(text: str) -> None:
        if not quiet:
            say(text, err=as_json)

    todo = tuple(cases(toolkit.release, platform))
    report.save(path)
    tell(report.head)
    try:
        with models() as made:
            for outcome in run_cases(todo, made, platform, ToolkitOptions(**options)):
                report.outcomes.append(outcome)
                report.save(path)
                for line in reports.lines(outcome):
                    tell(line)
    except KeyboardInterrupt:
        say(f"stopped after {len(report.outcomes)} of {len(todo)} cases; the report so far: {path}", err=True)
        raise
    report.complete = True
    report.save(path)
    if as_json:
        say_json(report.as_dict())
    for line in (report.summary,) if quiet else report.closing():
        say(line, err=as_json)
    say(f"report, to read or to send: {path}", err=as_json)
    context.exit(report.exit_code)


def _facts(toolkit: Toolkit) -> dict[str, Any]:
    release = toolkit.release
    return {
        "python": str(toolkit.python),
        "origin": toolkit.origin,
        "python_version": toolkit.python_version,
        "toolkit": toolkit.version,
        "described_by": release.row,
        "packages": dict(toolkit.parts),
        "arguments": {method: list(names) for method, names in release.arguments.items()},
        "dtypes": {platform: list(types) for platform, types in release.dtypes.items()},
        "npu_cores": dict(release.cores),
        "algorithms": list(release.algorithms),
        "max_context": release.context["most"],
        "load_dtypes": list(release.load_dtypes),
        "sources": dict(release.sources),
    }
