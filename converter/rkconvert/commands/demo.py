"""`rkedge demo`: the whole workflow in one command, shown as the commands that a user would type."""

from __future__ import annotations

import hashlib
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from rkruntime.bundle.manifest import open_bundle
from rkruntime.bundle.names import name_of
from rkruntime.errors import OutputError
from rkruntime.files import sha256_file, write_error
from rkruntime.folders import own_folder
from rkruntime.terminal import say

# Named, not imported: the board's tools do not depend on the converter. It has `checkpoint`, `adapter`, `questions`.
_MODEL: Final = "rkconvert.demo"
_ASKED: Final = ("What is the RK3588?", "Can the RK3588 use w4a16?", "Does it work?")
_BASE: Final = "demo-rk3588-w8a8-1.2.3"
_PIRATE: Final = "demo-pirate-rk3588-w8a8-1.2.3"


def _program() -> str:
    """Return how the user starts this rkedge: by name, or by path if the name is not on PATH."""
    found, own = shutil.which("rkedge"), Path(sys.argv[0])
    if own.name != "rkedge" or (found and Path(found).samefile(own)):
        return "rkedge"
    return os.path.relpath(own)


def _rkedge(*arguments: str | Path) -> None:
    """Show a command line and run it, in this process."""
    from rkruntime.cli import cli

    words = [str(word) for word in arguments]
    say(f"$ {shlex.join([_program(), *words])}", bold=True)
    cli.main(words, prog_name="rkedge", standalone_mode=False)


def _cache(model: Any) -> Path:
    """Return a folder in the user's cache for exactly these weights."""
    weights = sorted([*model.checkpoint().glob("*.safetensors"), *model.adapter().glob("*.safetensors")])
    digest = hashlib.sha256("".join(map(sha256_file, weights)).encode()).hexdigest()
    return own_folder("cache") / f"demo-{digest[:12]}"


def _bundle(folder: Path, checkpoint: Path, *options: str | Path) -> Path:
    """Convert, or use the bundle that an earlier run left. Raises BundleError if it has changed since."""
    if folder.exists():
        open_bundle(folder).verify()
        say(f"{folder} already exists.")
    else:
        _rkedge("convert", checkpoint, *options, "--target", "emulator", "-o", folder)
    return folder


def _next_steps(base: Path, pirate: Path) -> None:
    first, second = name_of(base), name_of(pirate)
    steps: Sequence[tuple[str, Sequence[str]]] = (
        ("talk to it; it knows some 40 questions about the RK3588, such as: What can you do?", ("chat", second)),
        ("use it in a script", ("run", first, _ASKED[0])),
        ("keep it loaded, with a chat page and the APIs of OpenAI and Ollama", ("up", second)),
        ("convert a checkpoint of your own", ("convert", "CHECKPOINT", "--lora", "ADAPTER", "-o", "my-bundle")),
    )
    say("\nThe answers came from the emulator, which computes in W8A8 on this machine; no board was used.")
    say("Next:")
    for purpose, words in steps:
        say(f"  rkedge {shlex.join(words)}")
        say(f"      {purpose}", dim=True)
    program = Path(_program())
    if program.name != str(program):
        say("First put rkedge on the PATH of this shell:")
        activate = program.parent / "activate"
        say(
            f"  . {shlex.quote(str(activate))}"
            if activate.is_file()
            else f"  export PATH={program.parent.resolve()}:$PATH"
        )


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="a folder of the cache",
    help="Write the two bundles to this folder.",
)
def run(output: Path | None) -> None:
    """Convert the demo model with and without its pirate LoRA, and let both answer.

    The model is a real Gemma 2 of 1.1 million weights that comes with rkedge; no board and no download is needed. A
    second run uses the bundles that the first one left.
    """
    model = importlib.import_module(_MODEL)
    folder = output or _cache(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        written = write_error(folder, error)
        raise OutputError(written.message, hint="Choose a folder that you may write, with --output.") from error
    checkpoint = model.checkpoint()
    base = _bundle(folder / _BASE, checkpoint)
    pirate = _bundle(folder / _PIRATE, checkpoint, "--lora", model.adapter())
    for bundle in (base, pirate):
        say()
        for question in _ASKED:
            _rkedge("run", bundle, "--temperature", "0", "-p", question)
    _next_steps(base, pirate)
