"""Run a command on a board with the user's own OpenSSH and its configuration, so host keys are checked as usual.

The output is untrusted: it is read in bounded memory, and only lines that begin with a mark count, as login scripts
print what they like.
"""

from __future__ import annotations

import os
import queue
import re
import select
import shlex
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Final

from rkruntime.errors import ServiceError, UsageError
from rkruntime.printable import one_line

SSH_VARIABLE: Final = "RKEDGE_SSH"
_MOST_NOTES: Final = 1 << 14
_MOST_LINES: Final = 12
# Time limit for a board that does not read what is sent to it.
_STALLED_S: Final = 300.0
# Time for reading what an ended process has left in its pipe.
_LAST_S: Final = 1.0
# Lines of an endless command that are queued until the caller takes them.
_MOST_WAITING: Final = 2
_MISSING: Final = {"ssh": "Install the OpenSSH client.", "sudo": "Leave out --sudo, or run rkedge doctor as root."}
# A dead connection is noticed after 15 seconds, not after TCP's quarter of an hour; so is one that cannot be made.
_SSH: Final = ("ssh", "-T", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
# What OpenSSH since 9.6 refuses in a user or host name: a shell may interpret it, in a ProxyCommand or in our hints.
_NO_DESTINATION: Final = re.compile(r"""^-|@-|//-|[\s'"`$;&<>|(){}]""")
_NOT_FOUND: Final = re.compile(
    r"(?:^|[:\s'])(sudo|python3)'?: (?:command )?not found|No such file or directory: '(sudo)'"
)
# Warnings of sudo after which it still runs the command.
_WARNED: Final = re.compile(r"sudo: (?:unable to resolve host|setrlimit)")


def missing_tool(notes: Sequence[str]) -> str:
    """Return `sudo` or `python3` if the notes say that the board does not have it, else an empty string."""
    found = (match for line in notes for match in _NOT_FOUND.finditer(line))
    return next((match[1] or match[2] for match in found), "")


def refused_by_sudo(notes: Sequence[str]) -> bool:
    """Whether sudo says, in whatever language, that it will not run the command."""
    return any("sudo:" in line.lower() and not _WARNED.search(line) for line in notes) or any(
        "not in the sudoers" in line or "may not run sudo" in line for line in notes
    )


def ssh_command(destination: str, *remote: str) -> list[str]:
    """Return the ssh command that runs `remote` on the board. ssh joins the words with spaces, for the board's shell.

    Raises:
        UsageError: The destination is empty or invalid, or the variable with the user's ssh command cannot be parsed.
    """
    if not destination:  # a variable of a script that was not set
        raise UsageError("The board has an empty name.", hint="Name it as for ssh: user@board")
    if _NO_DESTINATION.search(destination) or not destination.isprintable():
        raise UsageError(f"{one_line(destination[:80])!r} is not a board that ssh can reach.", hint="user@board")
    return [*(words_of(SSH_VARIABLE) or _SSH), "--", destination, *remote]


def words_of(variable: str) -> list[str]:
    """Split the command in an environment variable into words; empty if it is not set. Raises UsageError."""
    return words_of_text(os.environ.get(variable, ""), variable)


def words_of_text(text: str, where: str) -> list[str]:
    """Split a command into words. Raises UsageError, which names `where` the command was given."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"The command in {where} cannot be read: {error}.", hint="Quote it as for a shell, or unset it."
        ) from error


class Notes:
    """The last output on standard error of a process (ssh, sudo, or the command on a board), in bounded memory.

    Nobody waits for the end of the stream: a child, such as the master of ssh's shared connections, may keep it open.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._text, self._enough = b"", False
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while not self._enough and (block := os.read(stream.fileno(), _MOST_NOTES)):
                self._text = (self._text + block)[-_MOST_NOTES:]

    def lines(self) -> list[str]:
        """Return the last lines; call it when the process has ended."""
        self._reader.join(_LAST_S)
        self._enough = True
        return [one_line(line) for line in self._text.decode("utf-8", "replace").splitlines()][-_MOST_LINES:]


class Remote:
    """A process, on a board or here: its standard input, the marked lines that it prints, and its notes.

    Args:
        mark: Where a line that counts begins; text before it in the line, printed without a line feed, is ignored.
        most: Limit of the whole output in bytes.
        endless: Output may go on as long as each line that counts comes within `most` bytes; it waits for its reader.

    Attributes:
        flooded: Whether the process printed more than `most` allows.
        over: Whether the output has ended and all lines were taken.

    Raises:
        ServiceError: The command cannot be started.
    """

    def __init__(self, command: Sequence[str], mark: bytes, most: int, *, endless: bool = False) -> None:
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise ServiceError(
                f"{command[0]} cannot be started: {error.strerror or error}.",
                hint=_MISSING.get(command[0], f"Install it, or change {SSH_VARIABLE}, which names it."),
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._notes = Notes(self._process.stderr)
        self.flooded = self.over = self._deaf = False
        self._endless = endless
        self._found: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING if endless else 0)
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout, mark, most), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes], mark: bytes, most: int) -> None:
        left = most
        with stream:
            while left > 0 and (line := stream.readline(left)):
                left -= len(line)
                if (at := line.find(mark)) >= 0:
                    self._found.put(line[at:])
                    left = most if self._endless else left
        self.flooded = left <= 0
        self._found.put(None)

    def send(self, data: bytes) -> bool:
        """Write to the process's standard input; returns whether anybody still reads it."""
        assert self._process.stdin is not None
        left, room = memoryview(data), select.poll()
        try:
            handle = self._process.stdin.fileno()
            room.register(handle, select.POLLOUT)
            while left:
                self._deaf = self._deaf or not room.poll(_STALLED_S * 1000)
                if self._deaf:
                    return False
                left = left[os.write(handle, left) :]
        except (OSError, ValueError):
            return False
        return True

    def sent(self) -> None:
        """Close the process's standard input."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def line(self, patience: float) -> bytes | None:
        """Return the next marked line; None at the end, or if none comes within `patience` seconds."""
        try:
            found = self._found.get(timeout=patience)
        except queue.Empty:
            return None
        self.over = found is None
        return found

    def end(self, grace: float) -> int | None:
        """Wait `grace` seconds for the process, then kill it; returns its exit status, None if it had to be killed."""
        status = None
        try:
            self.sent()
            with suppress(subprocess.TimeoutExpired):
                status = self._process.wait(grace)
        finally:
            self._process.kill()
            self._process.wait()
            with suppress(queue.Empty):  # the reader may wait for room
                while self._endless:
                    self._found.get_nowait()
            self._reader.join(_LAST_S)  # a child of ssh may keep the pipe open
        return status

    @property
    def notes(self) -> list[str]:
        """The last lines of the process's standard error, once it has ended."""
        return self._notes.lines()
