"""The `rkedge` command: a table of commands, each imported on use."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Final, NamedTuple

import click

from rkruntime.cli.flags import Flags, asks_for_json, flag, refuse_empty_values
from rkruntime.errors import HostError, RKEdgeError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import open_streams, say, say_json, settle_streams

_NAME: Final = "rkedge"
# Variable that a shell sets to ask for completions; click derives its name from the program's.
_COMPLETE: Final = "_RKEDGE_COMPLETE"
# Most lines of another program's output to show above an error.
_MOST_LINES: Final = 12


class Command(NamedTuple):
    """A command's module, and its line in `rkedge --help` (shown without importing the module)."""

    module: str
    help: str


# A table, not entry points: those have no help lines, and looking them up reads the metadata of all installed packages,
# which took `--help` from 0.44 s to 0.58 s on a busy PC (medians of 15 alternated pairs).
COMMANDS: dict[str, Command] = {
    "demo": Command("rkconvert.commands.demo", "Convert the demo model with and without its LoRA and let both answer."),
    "plan": Command("rkconvert.commands.plan", "Say whether a model fits a board, and how fast it will be."),
    "compat": Command(
        "rkconvert.commands.compat", "Say which type runs on which SoC and release, and how that is known."
    ),
    "convert": Command(
        "rkconvert.commands.convert", "Turn a Gemma 2 checkpoint, with or without a LoRA, into a bundle."
    ),
    "merge": Command(
        "rkconvert.commands.merge", "Fold LoRA adapters into a checkpoint, as a plain Hugging Face folder."
    ),
    "calibrate": Command("rkconvert.commands.calibrate", "Make the texts that the toolkit quantizes a model with."),
    "push": Command("rkconvert.commands.push", "Upload a bundle to the Hugging Face hub, private by default."),
    "toolkit": Command(
        "rkconvert.commands.toolkit", "Set up the vendor's rkllm-toolkit, which makes files for a board."
    ),
    "up": Command("rkruntime.commands.up", "Load a bundle in the background, with chat, page and APIs."),
    "down": Command("rkruntime.commands.down", "End what `rkedge up` started."),
    "chat": Command("rkruntime.commands.chat", "Chat with a bundle here, or with a daemon here or on a board."),
    "run": Command("rkruntime.commands.run", "Answer one prompt, for scripts."),
    "list": Command("rkruntime.commands.list", "List the bundles that can be named without a path."),
    "rm": Command("rkruntime.commands.rm", "Remove a bundle."),
    "diagnose": Command("rkruntime.commands.diagnose", "Explain a log of RKLLM, RKNN, the NPU driver or the toolkit."),
    "emulator": Command("rkboard.commands.emulator", "Build a librkllmrt.so for this machine that needs no NPU."),
    "doctor": Command("rkboard.commands.doctor", "Say what is wrong with a board, here or over SSH, and mend it."),
    "deploy": Command("rkboard.commands.deploy", "Put a bundle, and what it needs, onto a board, and serve it there."),
    "rollback": Command("rkboard.commands.rollback", "Let a board serve what it served before."),
    "undeploy": Command("rkboard.commands.undeploy", "Take off a board what `rkedge deploy` has put there."),
    "status": Command("rkboard.commands.status", "Say what is on a board, and what it serves."),
    "logs": Command("rkboard.commands.logs", "Show the end of the log of a board's daemon."),
    "fleet": Command("rkboard.commands.fleet", "Deploy to many boards, and put one address in front of them."),
    "top": Command("rkboard.commands.top", "Show what a board does at the moment: NPU, clocks, heat, tokens/s."),
    "bench": Command("rkboard.commands.bench", "Measure a bundle's speed here or on a board, as llama-bench does."),
    "clocks": Command(
        "rkboard.commands.clocks", "Show the clocks of CPU, NPU and memory, or hold them for the time of a command."
    ),
    "serve": Command("rkruntime.commands.serve", "Serve a model over HTTP and SSH."),
    "attach": Command("rkruntime.commands.attach", "On a board: connect a chat that comes over SSH to the daemon."),
    "firstrun": Command("rkruntime.commands.firstrun", "On a board: find out what its runtime library really does."),
    "visit": Command("rkruntime.commands.visit", "On a board: try out a bundle for `rkedge compat --board` elsewhere."),
    "inspect": Command("rkruntime.commands.inspect", "Say what a bundle, a model file or a librkllmrt.so is."),
    "help": Command("rkruntime.commands.help", "Explain a command."),
}


@cache
def _imported(module: str) -> click.Command:
    command: click.Command = importlib.import_module(module).run
    refuse_empty_values(command)
    return command


class LazyGroup(click.Group):
    """A group whose commands are `module.run`, imported by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        return _imported(entry.module)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command if there is none with that name."""
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and near:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@flag("debug", "--debug", help="Show the traceback of an error.")
@click.version_option(None, "-V", "--version", package_name="rkedge")
def cli(debug: bool) -> None:
    """From a Gemma 2 checkpoint to a private chat on the NPU of an RK3588 board."""


def _report(error: RKEdgeError, as_json: bool) -> int:
    if as_json:
        _say_as_json(error)
    else:
        for line in error.log[-_MOST_LINES:]:
            say(one_line(line), lead="  ", err=True, dim=True)
    say(one_line(error.message), lead=click.style("error: ", fg="red", bold=True), err=True)
    if error.hint:
        say(one_line(error.hint), lead=click.style("hint:  ", fg="cyan", bold=True), err=True)
    return error.exit_code


def _say_as_json(error: RKEdgeError) -> None:
    # The error may be that standard output cannot be written; standard error and the exit code report it too.
    with suppress(OSError):
        say_json(error.as_dict())


def _typed(error: Exception, closed: Sequence[str]) -> RKEdgeError:
    """Return the error to show for an exception.

    Args:
        closed: See open_streams.
    """
    if isinstance(error, RKEdgeError):
        return error
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        path = context.command_path if context else _NAME
        return UsageError(error.format_message(), hint=f"{path} --help shows what there is.")
    if closed and isinstance(error, OSError) and error.errno == errno.EBADF:
        return HostError(
            f"This command was started with {' and '.join(closed)} closed, and needs it.",
            hint="Leave it open; a file, a pipe or /dev/null will do.",
        )
    from rkruntime.defects import typed  # slow to import, and needed only for an error

    return typed(error)


def _run(words: Sequence[str], flags: Flags) -> int:
    """Run a command line; returns its exit code.

    Not with `cli.main`, which by itself exits with 1 if the reader of the output is gone.
    """
    if os.environ.get(_COMPLETE):
        cli.main(list(words), prog_name=_NAME)  # exits
    try:
        with cli.make_context(_NAME, list(words), obj=flags) as context:
            status = cli.invoke(context)
    except click.exceptions.Exit as left:
        return left.exit_code
    return status if isinstance(status, int) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; this is the console script's function.

    Exit codes are those of the error tree, 130 for Ctrl-C, 141 if the reader of the output is gone.
    """
    flags, words = Flags(), sys.argv[1:] if argv is None else list(argv)
    closed = open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Write bytes of a path that are not UTF-8 as escapes that are also valid in JSON.
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(words, flags)
    except click.exceptions.NoArgsIsHelpError as error:  # its message is the help
        say(error.format_message())
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("\nstopped", err=True)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, is gone
        return 141
    except Exception as error:  # Users never see a traceback.
        if flags.debug:
            say(traceback.format_exc(), err=True, nl=False)
        return _report(_typed(error, closed), as_json=flags.json or asks_for_json(cli, words))
    finally:
        settle_streams()
