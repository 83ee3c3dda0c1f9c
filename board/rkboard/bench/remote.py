"""Measure on a board: `rkedge bench --json` there, over the user's own ssh."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Final

from rkboard.bench.result import Result
from rkruntime.chat.ways import over_ssh
from rkruntime.errors import ServiceError, UsageError
from rkruntime.evidence import MOST_BYTES
from rkruntime.remote import ssh_command

# USER@BOARD:BUNDLE, where an IPv6 address stands in brackets, as for scp.
_PLACE: Final = re.compile(r"([^@\s]+@)(\[[^\]\s]+\]|[^:\s\[]+):(.*)", re.DOTALL)
_MOST_LINE: Final = 1 << 12


def _is_address(text: str) -> bool:
    """Whether the part after the user is a bare IPv6 address, so that its colons do not begin a bundle."""
    try:
        return ipaddress.ip_address(text.rpartition("@")[2].partition("%")[0]).version == 6
    except ValueError:
        return False


@dataclass(frozen=True)
class Place:
    """A destination of ssh, and the name or path of a bundle there; empty for the only one."""

    destination: str
    bundle: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read `user@board`, `user@board:BUNDLE`, `ssh://user@board:port` or a host of ~/.ssh/config.

        Raises:
            UsageError: No bundle can have that name.
        """
        found = None if text.startswith("ssh://") or _is_address(text) else _PLACE.fullmatch(text)
        place = cls(f"{found[1]}{found[2].strip('[]')}", found[3]) if found else cls(text)
        if not place.bundle.isprintable() or place.bundle.startswith("-"):
            raise UsageError("The bundle on the board has a name that no bundle can have.")
        return place


def measure_there(place: Place, words: Sequence[str], say: Callable[[str], None]) -> tuple[Result, int]:
    """Measure on a board; return the result and the exit status of the command there.

    Ctrl-C ends the measurement there, not the connection: the result has what was measured until then.

    Args:
        words: Options for `rkedge bench` there.
        say: Called with each line that the command prints on standard error.

    Raises:
        ServiceError: The board cannot be reached, or sends something else.
    """
    remote = ["rkedge", "bench", "--json", "--until-eof", *words, *([place.bundle] if place.bundle else [])]
    command = ssh_command(place.destination, *map(shlex.quote, remote))
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # ssh inherits this
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        raise ServiceError(f"{command[0]} cannot be started: {error.strerror or error}.") from error
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    teller = threading.Thread(target=_tell, args=(process.stderr, say), daemon=True)
    teller.start()
    try:
        text = _read(process.stdin, process.stdout)
        process.stdin.close()
        status = process.wait(0 if len(text) > MOST_BYTES else 30)  # a board that floods may never end
    except subprocess.TimeoutExpired:
        status = 255
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        teller.join(1)
    if not text.strip():
        raise _nothing(place, status)
    _check_error(text)
    return Result.parse(text), status


def _check_error(text: bytes) -> None:
    """Raise the error that the command there has printed instead of a result."""
    with suppress(ValueError, RecursionError):
        said = json.loads(text)
        if isinstance(said, dict) and isinstance(said.get("message"), str):
            hint = said.get("hint")
            raise ServiceError(f"On the board: {said['message'][:500]}", hint=hint if isinstance(hint, str) else None)


def _read(stdin: IO[bytes], stdout: IO[bytes]) -> bytes:
    """Read all that the board prints. Ctrl-C closes its standard input, at which it finishes; a second one leaves."""
    text = bytearray()
    interrupted = False
    while len(text) <= MOST_BYTES:
        try:
            block = stdout.read1(1 << 16)  # type: ignore[attr-defined]
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            with suppress(OSError):
                stdin.close()
            continue
        if not block:
            break
        text += block
    return bytes(text)


def _tell(stream: IO[bytes], say: Callable[[str], None]) -> None:
    with stream:
        while line := stream.readline(_MOST_LINE):
            say(line.decode("utf-8", "replace").rstrip("\r\n"))


def _nothing(place: Place, status: int) -> ServiceError:
    """Return the error for a board that sent no result; its own message has already gone to standard error."""
    known = over_ssh(place.destination)
    if status in known.codes:
        return known.ended(status)
    return ServiceError(
        f"`rkedge bench` on {place.destination} ended with {status}, and sent no result.",
        hint=f"Its own message is above. Try it there: ssh {place.destination} rkedge bench",
    )


def until_eof(stop: Callable[[], object]) -> None:
    """Call `stop` once standard input is at its end, from a thread."""

    def wait() -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 1 << 12):  # not through sys.stdin: at its exit, Python would wait for its lock
                pass
        stop()

    threading.Thread(target=wait, daemon=True).start()
