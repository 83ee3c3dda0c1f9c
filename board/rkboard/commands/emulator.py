"""`rkedge emulator`: build the emulated librkllmrt.so and say where it is, for programs in any language."""

from __future__ import annotations

import shlex

import click

from rkboard.emulator import build as emulator
from rkboard.emulator import faults
from rkruntime.abi import DEFAULT_RELEASE, EMULATED, LAYOUTS, RELEASES
from rkruntime.cli.flags import json_option
from rkruntime.terminal import console, say, say_json

_RELEASE = click.option(
    "--release",
    type=click.Choice(EMULATED),
    default=DEFAULT_RELEASE,
    show_default=True,
    help="Emulate this release of librkllmrt.so.",
)
_ARCH = click.option(
    "--arch",
    type=click.Choice(["x86_64", "aarch64"]),
    show_default="this machine's",
    help="Build for this architecture.",
)
_JSON = json_option()


def _build(release: str, arch: str | None, sanitize: str | None = None) -> str:
    with console(stderr=True).status(f"building the emulator for {release}") as status:
        return str(emulator.build(release, arch=arch, sanitize=sanitize, progress=status.update))


@click.group("emulator")
def run() -> None:
    """Build a librkllmrt.so that emulates the NPU on this machine, for any program that uses RKLLM."""


@run.command("build")
@_RELEASE
@click.option("--all", "every", is_flag=True, help="Build one library for each ABI layout.")
@_ARCH
@click.option("--sanitize", metavar="NAMES", help="Build with -fsanitize=NAMES, such as address,undefined.")
@_JSON
def build(release: str, every: bool, arch: str | None, sanitize: str | None, as_json: bool) -> None:
    """Build a library and print its path."""
    newest = [versions[-1] for versions in LAYOUTS.values() if versions[-1] in EMULATED]
    releases = newest if every else [release]
    built = {name: _build(name, arch, sanitize) for name in releases}
    if as_json:
        say_json(built)
    else:
        say("\n".join(built.values()))


@run.command("path")
@_RELEASE
@_ARCH
def path(release: str, arch: str | None) -> None:
    """Print the folder to put on LD_LIBRARY_PATH, after building the library if necessary."""
    say(_build(release, arch).rpartition("/")[0])


@run.command("env")
@_RELEASE
def env(release: str) -> None:
    """Print shell lines that make programs find the emulator: eval "$(rkedge emulator env)"."""
    folder = _build(release, None).rpartition("/")[0]
    say(f'export LD_LIBRARY_PATH={shlex.quote(folder)}"${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"')


@run.command("info")
@click.option("--faults", "list_faults", is_flag=True, help="List the failures that RKEMU_FAULT can cause.")
@click.option(
    "--guesses",
    "list_guesses",
    is_flag=True,
    help="List the alternatives that RKEMU_GUESS selects where a board's behaviour is unknown.",
)
@_JSON
def info(list_faults: bool, list_guesses: bool, as_json: bool) -> None:
    """List the releases, which of them are built, and the compiler."""
    if list_faults or list_guesses:
        (_show_faults if list_faults else _show_guesses)(as_json)
        return
    compiler = emulator.find_compiler()
    releases = []
    for name in EMULATED:
        library = emulator.library_path(name)
        layout = RELEASES[name].layout
        releases.append({"release": name, "layout": layout, "library": str(library), "built": library.is_file()})
    facts = {
        "compiler": compiler.version,
        "arch": compiler.arch,
        "cache": str(emulator.cache_folder()),
        "releases": releases,
    }
    if as_json:
        say_json(facts)
        return
    say(f"compiler  {compiler.version} for {compiler.arch}\ncache     {facts['cache']}")
    for row in releases:
        state = row["library"] if row["built"] else "not built"
        say(f"{row['release']:8}  {row['layout']}  {state}")


def _show_faults(as_json: bool) -> None:
    rows = faults.faults()
    if as_json:
        say_json([row.as_dict() for row in rows])
        return
    for row in rows:
        name = f"{row.name}={row.value.upper()}" if row.value else row.name
        say(f"{name:24} {row.class_ or '-':34} {row.summary.replace('`', '')}")


def _show_guesses(as_json: bool) -> None:
    rows = faults.guesses()
    if as_json:
        say_json([row.as_dict() for row in rows])
        return
    for row in rows:
        say(f"{row.name}\n    usual: {row.usual.replace('`', '')}\n    other: {row.other.replace('`', '')}")
