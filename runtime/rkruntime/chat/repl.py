"""The chat at a terminal: the same loop and the same commands whether the model is here or behind SSH."""

from __future__ import annotations

import difflib
import shlex
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from rkruntime.engine.generation import FinishReason
from rkruntime.errors import RKEdgeError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import Terminal
from rkruntime.text.answer import UNFINISHED

PROMPT: Final = ">>> "


@dataclass(frozen=True)
class Turn:
    """A finished or stopped answer.

    Attributes:
        tokens: Tokens generated.
        first_token_s: Seconds from the question to the first token.
        tokens_per_s: Decode rate after the first token.
    """

    tokens: int
    reason: FinishReason
    first_token_s: float
    tokens_per_s: float

    def summary(self, emulated: bool) -> str:
        """Return a summary in one line."""
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"] if self.tokens else []
        if self.tokens > 1:
            parts.append(f"{self.tokens_per_s:,.1f} tokens/s{' (emulated)' if emulated else ''}")
        if self.tokens:
            parts.append(f"first after {self.first_token_s * 1000:,.0f} ms")
        if self.reason in UNFINISHED:
            parts.append(UNFINISHED[self.reason])
        return ", ".join(parts) or "no tokens"


@dataclass(frozen=True)
class Note:
    """Something to show the user before the answer."""

    text: str


class ChatBackend(Protocol):
    """A conversation with a model, wherever the model is.

    Attributes:
        title: Description of the model and where it runs, for the first line.
        emulated: Whether the runtime is emulated, so that its figures are not a board's.
        system: System prompt.
        last: Last answer, even if stopped.
    """

    title: str
    emulated: bool
    last: Turn | None

    @property
    def system(self) -> str:
        """The system prompt; empty for none."""
        ...

    def set_system(self, text: str) -> None:
        """Set another system prompt."""
        ...

    def ask(self, text: str) -> Generator[str | Note, None, None]:
        """Yield pieces of the answer. Closing the iterator early stops the answer and keeps the part there is."""
        ...

    def stop(self) -> None:
        """Stop the current answer and everything done for it, from any thread; the second time, at once."""
        ...

    def clear(self) -> None:
        """Forget the turns."""
        ...

    def take_back(self) -> str | None:
        """Forget the last turn; returns its question, or None if there is none."""
        ...

    def save(self, path: Path) -> None:
        """Write the conversation to a file."""
        ...

    def load(self, path: Path) -> None:
        """Continue a conversation from a file."""
        ...

    def stats(self) -> Mapping[str, str]:
        """Return names and values for /stats."""
        ...


@dataclass(frozen=True)
class ChatCommand:
    """A command of the chat: its usage, its help, and its function."""

    usage: str
    help: str
    action: Callable[[Repl, str], None]


class Repl:
    """Read messages and commands until the input ends."""

    def __init__(self, chat: ChatBackend, terminal: Terminal) -> None:
        self.chat = chat
        self.terminal = terminal
        self.leaving = False
        self.failure: RKEdgeError | None = None

    def run(self) -> None:
        """Chat until the end of the input or /exit.

        Raises:
            RKEdgeError: The last answer failed, and there is no terminal to show the error on.
            KeyboardInterrupt: SIGINT without a terminal, which ends the program; a stopped answer is kept.
        """
        if self.terminal.interactive:
            self.terminal.note(f"{self.chat.title}\n/help for commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while not self.leaving:
            try:
                text = self.terminal.read(PROMPT)
            except KeyboardInterrupt:
                if not self.terminal.interactive:
                    raise
                self.terminal.note("\nCtrl-D or /exit leaves")
                continue
            if text is None:
                break
            if text.strip() or not self.terminal.interactive:
                self._handle(text)
        if self.failure and not self.terminal.interactive:
            raise self.failure

    def _handle(self, text: str) -> None:
        self.failure = None
        try:
            # Commands only from a user: a program may pass on others' texts, and a command can write files.
            if self.terminal.interactive and text.strip().lower() in _LEAVING:
                self._command("/exit")
            elif self.terminal.interactive and text.startswith("/"):
                self._command(text)
            else:
                self.answer(text)
        except RKEdgeError as error:
            if not self.terminal.interactive:
                self.failure, self.leaving = error, True
                return
            for line in error.log:
                self.terminal.note(f"  {one_line(line)}")
            self.terminal.error(f"error: {one_line(error.message)}")
            self.terminal.note(f"hint:  {one_line(error.hint)}")

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        word = name.strip().lower()
        command = COMMANDS.get(_ALIASES.get(word, word))
        if command is None:
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"Unknown command {name}.", hint=f"{hint}Commands: {' '.join(COMMANDS)}")
        command.action(self, rest.strip())

    def answer(self, text: str) -> None:
        """Ask the model and show its answer."""
        try:
            with self._stopped_by_ctrl_c() as stopped, closing(self.chat.ask(text)) as pieces:
                for piece in pieces:
                    if isinstance(piece, Note):
                        self.terminal.note(piece.text)
                    else:
                        self.terminal.write(piece)
        except RKEdgeError:
            self.terminal.end_line()
            raise
        self.terminal.write("\n")
        if stopped.is_set() and not self.terminal.interactive:  # A program must not take this for a whole answer.
            raise KeyboardInterrupt
        if self.chat.last and self.terminal.interactive:
            self.terminal.note(f"[{self.chat.last.summary(self.chat.emulated)}]")
        elif self.chat.last:
            self.terminal.not_whole(UNFINISHED.get(self.chat.last.reason))

    @contextmanager
    def _stopped_by_ctrl_c(self) -> Iterator[threading.Event]:
        """Make Ctrl-C stop the answer, not the program; the part generated so far stays in the conversation.

        Yields an event that Ctrl-C sets. The handler requests the stop in a thread of its own: an exception at an
        arbitrary place could leave conversation and worker inconsistent.
        """

        stopped = threading.Event()

        def stop(*_: object) -> None:
            stopped.set()
            threading.Thread(target=self.chat.stop, daemon=True).start()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield stopped
        finally:
            signal.signal(signal.SIGINT, before)


def _help(repl: Repl, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        repl.terminal.note(f"{command.usage:{width}}  {command.help}")
    repl.terminal.note('\n""" begins and ends a message of several lines; \\ at the end of a line adds the next one.')


def _clear(repl: Repl, _: str) -> None:
    repl.chat.clear()
    repl.terminal.note("The conversation is empty; the system prompt stays.")


def _system(repl: Repl, text: str) -> None:
    if text:
        repl.chat.set_system("" if text == "-" else text)
    repl.terminal.note(f"System prompt: {repl.chat.system or '(none)'}")


def _save(repl: Repl, text: str) -> None:
    path = _path(text)
    repl.chat.save(path)
    repl.terminal.note(f"Saved to {path}.")


def _load(repl: Repl, text: str) -> None:
    path = _path(text)
    repl.chat.load(path)
    repl.terminal.note(f"Continuing the conversation from {path}.")


def _path(text: str) -> Path:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text} is not a file name: {error}") from error
    if len(words) != 1:
        raise UsageError("This needs one file name.", hint="For example: /save talk.json")
    try:
        return Path(words[0]).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{words[0]} names the home folder of an unknown user.", hint="Write the whole path."
        ) from None


def _stats(repl: Repl, _: str) -> None:
    values = repl.chat.stats()
    width = max(map(len, values), default=0)
    for name, value in values.items():
        repl.terminal.note(f"{name:{width}}  {value}")


def _regenerate(repl: Repl, _: str) -> None:
    question = repl.chat.take_back()
    if question is None:
        raise UsageError("There is no answer to give again.", hint="Ask something first.")
    repl.answer(question)


def _set(repl: Repl, text: str) -> None:
    name, _, rest = text.partition(" ")
    if name != "system":
        raise UsageError(
            f"/set {name}".strip() + " is not possible in a chat.",
            hint="/set system TEXT is; --temperature, --max-new-tokens and others are options of the command.",
        )
    _system(repl, rest.strip())


def _exit(repl: Repl, _: str) -> None:
    repl.leaving = True


COMMANDS: Final[Mapping[str, ChatCommand]] = {
    "/help": ChatCommand("/help", "This list.", _help),
    "/clear": ChatCommand("/clear", "Start a new conversation.", _clear),
    "/system": ChatCommand("/system [TEXT]", "Show or set the system prompt; - removes it.", _system),
    "/save": ChatCommand("/save FILE", "Write the conversation to a file.", _save),
    "/load": ChatCommand("/load FILE", "Continue a saved conversation.", _load),
    "/stats": ChatCommand("/stats", "Show tokens, speed and context so far.", _stats),
    "/regenerate": ChatCommand("/regenerate", "Give the last answer again (also /retry).", _regenerate),
    "/set": ChatCommand("/set system TEXT", "The same as /system.", _set),
    "/exit": ChatCommand("/exit", "Leave (also /quit, /bye, exit and Ctrl-D).", _exit),
}
# Names that other chats have for these commands, and words that people type to leave.
_ALIASES: Final[Mapping[str, str]] = {
    "/quit": "/exit", "/bye": "/exit", "/q": "/exit", "/?": "/help", "/retry": "/regenerate", "/reset": "/clear",
    "/new": "/clear",
}  # fmt: skip
_LEAVING: Final = ("exit", "quit", "bye")
