"""Input and output with a user at a terminal or a program at a pipe."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import click

from rkruntime.errors import UsageError
from rkruntime.folders import own_folder
from rkruntime.printable import escaped, printable

if TYPE_CHECKING:
    from rich.console import Console

BLOCK: Final = '"""'
# Most bytes of a text to be asked: 16 for each token of the largest context, so that no endless input fills the memory.
MAX_TEXT: Final = 16 << 20
_HISTORY_LINES: Final = 1000


def open_streams() -> Sequence[str]:
    """Put something in place of each standard stream that was closed when this process was started.

    Otherwise the next file or pipe to be opened would take its number. Reading the input or writing an answer there
    fails with EBADF; messages to standard error are lost.

    Returns:
        What was closed, in words.
    """
    streams = (
        ("stdin", "standard input", "r", os.O_WRONLY),
        ("stdout", "standard output", "w", os.O_RDONLY),
        ("stderr", "standard error", "w", os.O_WRONLY),
    )
    closed = []
    for number, (name, words, mode, access) in enumerate(streams):
        if getattr(sys, name) is None:
            _put(os.open(os.devnull, access), number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - stays open
            closed.append(words)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in the C locale, Python would let invalid UTF-8 through
    return closed


def settle_streams() -> None:
    """Drop output that cannot be written: its writer has had the error, and Python would complain again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # noqa: PERF203 - there are two
            _put(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _put(handle: int, number: int) -> None:
    """Move an open file to the descriptor `number`."""
    if handle != number:
        os.dup2(handle, number)
        os.close(handle)


def say(text: str = "", *, lead: str = "", err: bool = False, nl: bool = True, **style: Any) -> None:
    """Print a text that may contain anything. Commands print only through this; see rkruntime.printable.

    Args:
        lead: Trusted text in front of it, which may contain escape sequences.
        err: Print to standard error. If nothing can be written there, the message is lost, and the work goes on.
        style: Options of click.style.
    """
    text = printable(text)
    with suppress(OSError) if err else nullcontext():
        click.echo(lead + (click.style(text, **style) if any(style.values()) else text), err=err, nl=nl)


def say_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON document, with control characters escaped as in JSON."""
    click.echo(escaped(json.dumps(value, ensure_ascii=False, indent=indent)))


def console(**options: Any) -> Console:
    """Return a rich console that makes the contents of tables and progress bars printable."""
    from rich.console import Console
    from rich.segment import Segment

    class Printable(Console):
        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

        def on_broken_pipe(self) -> None:
            raise  # rich calls this while it handles the error, and would exit with 1 itself

    return Printable(**options)


class Terminal:
    """Standard input and output.

    Attributes:
        interactive: Whether a user reads and types. If not, there are no prompts and no colors, and notes go to
            standard error.
    """

    def __init__(self, history: Path | None = None, words: Sequence[str] = ()) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._colour = self.interactive and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._readline = _line_editor(history, words) if self.interactive else None
        self._history = history
        self._within_line = False

    def read(self, prompt: str) -> str | None:
        """Return the next message, or None at the end of the input. A program's line is taken as it is.

        A user's line that begins with three quotes opens a block up to the next three; a backslash at its end joins the
        next line.

        Raises:
            KeyboardInterrupt: Ctrl-C while typing.
        """
        line = self._line(prompt)
        if line is None or not self.interactive:
            return line
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip()[len(BLOCK) :])
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line("... ") or "")
        return "\n".join(lines)

    def _block(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(BLOCK):
            following = self._line("... ")
            if following is None:
                return "\n".join(lines).strip("\n")
            lines.append(following)
        lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        return self._typed(prompt) if self.interactive else _given()

    def _typed(self, prompt: str) -> str | None:
        """A line that a person types. One that cannot be read is no reason to end what may be a long conversation."""
        while True:
            try:
                return input(self._prompt(prompt))
            except EOFError:  # noqa: PERF203 - a person may err again
                return None
            except UnicodeDecodeError as error:
                self.error(f"error: That line is not UTF-8, and was not asked: {error}.")

    def _prompt(self, text: str) -> str:
        # \x01 and \x02 tell readline that the text between them has no width.
        return f"\x01\x1b[1;34m\x02{text}\x01\x1b[0m\x02" if self._colour else text

    def write(self, text: str) -> None:
        """Write a piece of an answer and flush it; control characters stay only if it goes to a file or a program."""
        sys.stdout.write(printable(text) if self.interactive or sys.stdout.isatty() else text)
        sys.stdout.flush()
        self._within_line = not text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line if an answer ended within one."""
        if self._within_line:
            self.write("\n")

    def note(self, text: str = "") -> None:
        """Print a line that is about the chat and not part of it; to standard error if no user is there."""
        say(text, err=not self.interactive, dim=self._colour)

    def not_whole(self, why: str | None) -> None:
        """Say, outside the answer, why it may not be whole, unless it is: at a limit it can also end by itself."""
        if why:
            self.note(f"The answer may not be whole: {why}.")

    def error(self, text: str) -> None:
        """Print a line that says what went wrong."""
        say(text, err=True, fg="red" if self._colour else None)

    def close(self) -> None:
        """Save the history."""
        if self._readline and self._history:
            try:
                self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._readline.set_history_length(_HISTORY_LINES)
                self._readline.write_history_file(str(self._history))
                self._history.chmod(0o600)
            except OSError as error:
                self.error(f"The history was not saved: {error.strerror}.")


def _given() -> str | None:
    """A line from a program. Raises UsageError."""
    try:
        line = sys.stdin.readline(MAX_TEXT + 1)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The input is not UTF-8: {error}.", hint="Convert it first, for instance with iconv."
        ) from error
    if len(line) > MAX_TEXT:
        raise too_much("A line of the input")
    return line.rstrip("\r\n") if line else None


def too_much(what: str) -> UsageError:
    """The error for a text that is longer than MAX_TEXT."""
    return UsageError(
        f"{what} has more than {MAX_TEXT >> 20} MB, which no context holds.", hint="Ask about a part of it."
    )


def history_file() -> Path:
    """Return the path of the file that keeps the user's questions."""
    return own_folder("state") / "history"


def _line_editor(history: Path | None, words: Sequence[str]) -> ModuleType | None:
    """Return readline with a history and completion of `words`; None if Python was built without it."""
    try:
        import readline
    except ImportError:
        return None

    def complete(text: str, state: int) -> str | None:
        matches = [word for word in words if word.startswith(text)] if text else []
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \n")
    readline.parse_and_bind("tab: complete")
    # A pasted text of several lines stays one message.
    readline.parse_and_bind("set enable-bracketed-paste on")
    if history:
        # There may be no history yet; the chat works without it.
        with suppress(OSError):
            readline.read_history_file(str(history))
    return readline
