"""`rkedge visit`: the board's end of `rkedge compat --board`. Each operation prints marked lines of JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from rkruntime.cli.flags import TOKENS
from rkruntime.errors import RKEdgeError
from rkruntime.visit import MARK, PROTOCOL

if TYPE_CHECKING:
    from rkruntime.visit.place import Place

# The other end says every few seconds that it is there; after so many seconds of silence, it counts as gone.
_GONE_S: Final = 60.0
# Seconds that a run may take to end once nobody waits for it.
_ENDING_S: Final = 20.0
_BLOCK: Final = 1 << 12
_printing = threading.Lock()


def _tell(**event: Any) -> None:
    line = MARK + json.dumps(event).encode() + b"\n"
    with _printing:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def _told(operation: Callable[..., None]) -> Callable[..., None]:
    """Decorate an operation: its errors are also reported to the other end."""

    @wraps(operation)
    def run(*args: Any, **given: Any) -> None:
        try:
            operation(*args, **given)
        except RKEdgeError as error:
            _tell(event="error", **error.as_dict())
            raise

    return run


def _place(id: str) -> Place:
    from rkruntime.visit.place import Place

    return Place(id)


@click.group("visit")
def run() -> None:
    """Try out a bundle that another machine sends: the board's end of `rkedge compat --board`."""


@run.command("open")
@click.argument("id")
@_told
def run_open(id: str) -> None:
    """Make the folder of the visit ID, and say what is in it."""
    import shutil

    from rkruntime.checks import machine

    place = _place(id)
    with place.alone():
        _tell(
            event="open",
            protocol=PROTOCOL,
            rkedge=version("rkedge"),
            folder=str(place.bundle),
            sizes=place.sizes(),
            rsync=shutil.which("rsync") is not None,
            free=shutil.disk_usage(place.folder).free,
            boot=machine.boot_id(),
        )


@run.command("receive")
@click.argument("id")
@click.argument("name")
@click.argument("offset", type=click.IntRange(min=0))
@_told
def run_receive(id: str, name: str, offset: int) -> None:
    """Write standard input into the file NAME of the visit ID, from OFFSET on."""
    place = _place(id)
    with place.alone():
        _tell(event="received", size=place.receive(name, offset, sys.stdin.buffer))


@run.command("check")
@click.argument("id")
@_told
def run_check(id: str) -> None:
    """Compare the files of the visit ID with their hashes, and remove those that are wrong."""
    place = _place(id)
    with place.alone():
        _tell(event="checked", wrong=place.wrong())


@run.command("try")
@click.argument("id")
@click.option("--step", "steps", multiple=True, metavar="STEP", help="Do this; may be repeated.")
@click.option("--max-context", type=TOKENS, show_default="the model's limit", help="Set the context length.")
@click.option("--library", type=click.Path(path_type=Path, dir_okay=False), help="Load this librkllmrt.so.")
@click.option("--force", is_flag=True, help="Load the model even if it is known not to work on this board.")
@_told
def run_try(id: str, steps: tuple[str, ...], max_context: int | None, library: Path | None, force: bool) -> None:
    """Load the bundle of the visit ID and do the steps. Ends when standard input does."""
    from rkruntime.engine.open import RuntimeOptions, SamplingOptions
    from rkruntime.model import Model, open_model
    from rkruntime.visit.steps import results

    place = _place(id)
    options = RuntimeOptions(library=library, max_context=max_context, force=force)
    with place.alone():
        os.environ["TMPDIR"] = tempfile.tempdir = str(place.temporary)
        _watch()

        def load() -> Model:
            return open_model(place.open(), options, SamplingOptions(temperature=0))

        for step, result in results(load, steps):
            _tell(event="begin", step=step) if result is None else _tell(event="done", step=step, result=result)
    _tell(event="end")


def _watch() -> None:
    """Interrupt this process when the other end is gone, and tell the other end regularly that this one is alive."""
    heard = threading.Event()
    over = threading.Event()

    def hear() -> None:
        while os.read(sys.stdin.fileno(), _BLOCK):  # not with sys.stdin, whose lock would keep it from being closed
            heard.set()
        over.set()
        heard.set()

    def judge() -> None:
        while heard.wait(_GONE_S) and not over.is_set():
            heard.clear()
            try:
                _tell(event="alive")
            except OSError:
                break
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_ENDING_S)
        os._exit(1)  # the worker ends with this process

    for watch in (hear, judge):
        threading.Thread(target=watch, daemon=True).start()


@run.command("remove")
@click.argument("id")
@_told
def run_remove(id: str) -> None:
    """Remove all that the visit ID has brought."""
    place = _place(id)
    with place.alone():
        place.remove()
    _tell(event="removed")
