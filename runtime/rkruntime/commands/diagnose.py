"""`rkedge diagnose`: explain what went wrong, from a log of RKLLM, RKNN, the NPU driver or the toolkit."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import click

from rkruntime.checks.diagnosis import Diagnosis, diagnose
from rkruntime.checks.failures import table
from rkruntime.checks.longlog import ReadLog, read_log
from rkruntime.cli.flags import json_option
from rkruntime.errors import InputError
from rkruntime.terminal import say, say_json

_MEANING = {
    "high": "the text identifies this fault",
    "medium": "the text usually goes with this fault; see the alternatives",
    "low": "only a hint; the log says nothing better",
}
_WIDTH = 100
_MOST_SOURCES = 5
# Most control characters that a short log may have and still count as text.
_MOST_ODD = 100


def _read(name: str) -> ReadLog:
    if name == "-":
        return read_log(sys.stdin.buffer, table())
    try:
        with Path(name).open("rb") as stream:
            return read_log(stream, table())
    except OSError as error:
        raise InputError(
            f"The log {name!r} cannot be read: {error.strerror}.", hint="Name a log file, or - to read a pipe."
        ) from error


def _is_binary(text: str) -> bool:
    """Whether a text has many control characters other than a terminal's."""
    odd = sum(not (character.isprintable() or character.isspace() or character in "\b\x1b") for character in text)
    return odd > max(_MOST_ODD, len(text) / 20)


def _section(title: str, entries: tuple[str, ...], bullet: str = "  ") -> None:
    if not entries:
        return
    say(f"\n{title}", bold=True)
    for number, entry in enumerate(entries, 1):
        first = bullet.replace("#", str(number))
        say(
            textwrap.fill(
                entry, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False
            )
        )


def _print(found: Diagnosis) -> None:
    say(f"{found.class_}: {found.title}", bold=True, fg="red" if found.explained else "yellow")
    if found.confidence in _MEANING:
        say(f"confidence: {found.confidence} ({_MEANING[found.confidence]})")
    _section("In the log" if found.explained else "Lines that look like trouble", found.lines)
    _section("What it means", (found.cause,))
    _section("What the log rules out", found.rules_out)
    _section("What was not read", (found.not_read,) if found.not_read else ())
    _section("What to do", found.next_steps, "  #. ")
    _section("Also in this log", found.others)
    rest = len(found.evidence) - _MOST_SOURCES
    more = (f"and {rest} more (--json)",) if rest > 0 else ()
    _section("Where this comes from", found.evidence[:_MOST_SOURCES] + more)


@click.command("diagnose")
@click.argument("log", metavar="FILE|-")
@json_option()
def run(log: str, as_json: bool) -> None:
    """Explain a log of RKLLM, RKNN, the NPU driver or rkllm-toolkit.

    FILE is the output of a program, a journal, a kernel log or a container's log, of any size. With -, standard input
    is read: sudo dmesg | rkedge diagnose -
    """
    read = _read(log)
    if not read.text.strip():
        raise InputError(
            "The log is empty.", hint="Was it written at all? dmesg needs sudo: sudo dmesg | rkedge diagnose -"
        )
    if _is_binary(read.text):
        raise InputError(
            "This is not text.", hint="Give what a program printed; `rkedge inspect` tells what a file is."
        )
    found = diagnose(read)
    if as_json:
        say_json(found.as_dict())
    else:
        _print(found)
