"""A process with limits, for work on untrusted data: if it gets slow, grows, hangs or crashes, it is killed.

Parent and child send each other messages over a pair of sockets: two u32 (sizes), a JSON object, bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from rkruntime.errors import BundleError, ContextFullError, HostError, RKEdgeError, RunError, UsageError
from rkruntime.owner import Owner
from rkruntime.packages import import_failed
from rkruntime.printable import one_line
from rkruntime.words import counted

_SIZES: Final = struct.Struct("<II")
_MAX_MESSAGE: Final = 1 << 28
_PART: Final = 1 << 16
# Characters of a message that is encoded at once.
_SMALL: Final = 1 << 12
# Errors of a child that its parent raises again, by name.
_ERRORS: Final[Mapping[str, type[RKEdgeError]]] = {
    kind.__name__: kind for kind in (BundleError, ContextFullError, HostError, UsageError)
}
# The child imports only from the parent's own sys.path.
_START: Final = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "import importlib; importlib.import_module(sys.argv[2]).main()"
)
# Variables that the child inherits. Not LD_PRELOAD: preloaded libraries may need more address space than the limit.
_VARIABLES: Final = ("PATH", "LANG", "LC_ALL", "LC_TIME", "TZ", "LD_LIBRARY_PATH")
_HINT: Final = "Convert the model again with the tokenizer.json and chat_template.jinja of its Gemma checkpoint."
_MAX_LOG: Final = 1 << 16
_SLICE: Final = 0.25
# Seconds that a call may still take once its result is no longer wanted.
_GRACE: Final = 2.0

Answer: TypeAlias = tuple[dict[str, Any], bytes]


# Limit of a child's address space in bytes. A tokenizer of 256,000 tokens takes a quarter of it.
MEMORY: Final = 1 << 30


@dataclass(frozen=True)
class CallLimits:
    """The limits of one call.

    Attributes:
        cpu_s: Seconds of CPU time.
        wall_s: Seconds until the answer, on a machine that does other things too.
    """

    cpu_s: int = 10
    wall_s: float = 60.0


class Confined:
    """A child process. Thread-safe; callers wait for each other.

    Args:
        module: Module of the child, whose function `main` calls `serve`.
        what: Name of the work for messages, such as "The chat template".
    """

    def __init__(self, module: str, what: str) -> None:
        self._module, self._what = module, what
        self._lock = threading.RLock()  # `close` may be called by the handler of a signal that comes during a call
        self._deadline, self._hurried = 0.0, math.inf
        self._process: subprocess.Popen[bytes] | None = None
        self._answering = False
        self._owner = Owner()

    @property
    def pid(self) -> int | None:
        """Process id of the child, if there is one."""
        return self._process.pid if self._process else None

    @property
    def idle_pid(self) -> int | None:
        """`pid`, or None if the child has died or still owes an answer, as the next call then starts another child."""
        return None if self._answering or self._died else self.pid

    @property
    def _died(self) -> bool:
        """Whether it ended by itself, such as by the kernel's choice when memory ran out."""
        return self._owner.here and self._process is not None and self._process.poll() is not None

    def call(self, name: str, limits: CallLimits, data: bytes = b"", **values: Any) -> Answer:
        """Call the child's function `name`; starts a child if there is none.

        Raises:
            BundleError: The call reached a limit of CPU time or memory, or was hurried; the child is then gone.
            HostError: The child cannot be started, hardly ran, or was killed by something else.
            RKEdgeError: The error that the function raised.
            RunError: This process is a fork of the one that started the child.
        """
        if not self._owner.here and self._process is None:  # a fork, but without a child that would be its parent's
            self._owner, self._lock = Owner(), threading.RLock()
        self._owner.check()
        with self._lock:
            self._deadline = time.monotonic() + limits.wall_s
            # An interrupt left the last call's answer unread, which is not this call's.
            if self._answering or self._died:
                self._end()
            if self._process is None:
                self._start()
            self._answering = True
            try:
                _send(self._socket, _encoded({**values, "call": name, "cpu_s": limits.cpu_s}), data, self._check_time)
                header, data = _receive(self._socket, self._check_time)
                self._answering = False
            except TimeoutError:
                self._end()
                raise self._late(limits) from None
            except (OSError, EOFError, ValueError):
                raise self._gone(limits) from None
            except BaseException:  # Ctrl-C, or what a signal's handler raised
                self._end()
                raise
        if "error" in header:
            kind = _ERRORS.get(str(header["error"]), BundleError)
            raise kind(str(header.get("message")), hint=str(header.get("hint")), details=header.get("details"))
        return header, data

    def hurry(self) -> None:
        """Cut short this call and later ones, until `take_time`; call it from another thread."""
        self._hurried = time.monotonic() + _GRACE

    def take_time(self) -> None:
        """Give the next calls their full time again."""
        self._hurried = math.inf

    def close(self) -> None:
        """Kill the child and thereby end the current call. The next call starts another child."""
        if not self._owner.here:
            return
        self._hurried = 0.0
        with self._lock:
            self._end()
        self.take_time()

    def _check_time(self) -> None:
        """Raise TimeoutError after the deadline. Called at least every _SLICE seconds."""
        if time.monotonic() >= min(self._deadline, self._hurried):
            raise TimeoutError

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(_SLICE)
        log = os.memfd_create("rkedge")
        paths = [path for path in sys.path if path.startswith("/")]
        command = [sys.executable, "-I", "-S", "-B", "-c", _START, json.dumps(paths), self._module]
        command += [self._what]
        environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        # One thread, because each one takes address space.
        environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        try:
            # A session of its own: Ctrl-C in the terminal reaches only the parent.
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=log, stderr=log, env=environment, start_new_session=True
            )
        except OSError as error:
            ours.close()
            os.close(log)
            raise HostError(
                f"A process for {self._what.lower()} cannot be started: {error.strerror or error}.",
                hint="Check that this Python still exists, and the limits on processes, memory and files (ulimit -a).",
            ) from error
        finally:
            theirs.close()
        # Kills the child also when this program exits without a call of `close`.
        self._killed = weakref.finalize(self, _kill, process, ours, log, self._owner)
        self._socket, self._process, self._answering = ours, process, False

    def _end(self) -> tuple[int, str]:
        """Kill the child; returns its exit code and what it printed."""
        process, self._process = self._process, None
        return (process and self._killed()) or (0, "")

    def _gone(self, limits: CallLimits) -> RKEdgeError:
        """Return the error that explains why the child has closed its socket."""
        process = self._process
        if process is None:
            return RunError(f"The model was closed while the process for {self._what.lower()} worked.")
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._end()
            return self._over("broke off")
        code, printed = self._end()
        # Only import errors of its output: a library that fails quotes the text it failed on, which is private.
        missing = re.findall(r"^(?:Import|ModuleNotFound)Error: .*", printed, re.MULTILINE)
        said = one_line(missing[-1])[:300] if missing else ""
        if code == -signal.SIGXCPU:
            return self._over(f"took more than {limits.cpu_s} seconds of CPU time")
        if code == -signal.SIGABRT and "memory allocation" in printed:
            return self._over(f"took more than {MEMORY >> 20} MiB of memory")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return HostError(
            f"The process for {self._what.lower()} {how}{f': {said}' if said else ''}.",
            hint="If a package is missing, reinstall rkedge; otherwise check whether memory ran out, and try again.",
        )

    def _late(self, limits: CallLimits) -> RKEdgeError:
        """Return the error for a child without an answer in time; one that runs uses up its CPU time long before."""
        if self._hurried < self._deadline:
            return self._over("was not done when its result was no longer wanted")
        return HostError(
            f"The process for {self._what.lower()} did not answer within {counted(limits.wall_s, 'second')}, "
            f"without using {counted(limits.cpu_s, 'second')} of CPU time: it hardly ran.",
            hint="The machine is very busy or short of memory, or something has stopped the process. Check with top "
            "and dmesg, then try again.",
        )

    def _over(self, how: str) -> BundleError:
        return BundleError(
            f"{self._what} {how}, and was stopped.",
            hint=_HINT,
        )


def _kill(process: subprocess.Popen[bytes], one: socket.socket, log: int, owner: Owner) -> tuple[int, str]:
    if not owner.here:  # a fork that exits
        return 0, ""
    process.kill()
    code = process.wait()
    one.close()
    printed = os.pread(log, _MAX_LOG, 0).decode("utf-8", "replace")
    os.close(log)
    return code, printed


def _send(one: socket.socket, text: bytes, data: bytes, check_time: Callable[[], None]) -> None:
    view = memoryview(_SIZES.pack(len(text), len(data)) + text + data)
    while view:
        check_time()
        with suppress(TimeoutError):
            view = view[one.send(view) :]


def _encoded(header: Mapping[str, Any]) -> bytes:
    """Return a message's header as JSON."""
    encoder = json.JSONEncoder()
    if _room(header, _SMALL) >= 0:
        return encoder.encode(header).encode()
    # Piecewise, which takes ten times as long: megabytes at once would keep other threads waiting for the interpreter.
    return "".join(encoder.iterencode(header)).encode()


def _room(value: Any, room: int) -> int:
    """Return what is left of `room` characters after those of a value; negative if it needs more."""
    if isinstance(value, str):
        return room - len(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return room - 1
    for item in value.values() if isinstance(value, Mapping) else value:
        room = _room(item, room)
        if room < 0:
            break
    return room


def _receive(one: socket.socket, check_time: Callable[[], None]) -> Answer:
    """Receive the next message, which nothing follows until it is answered.

    Raises EOFError if the other end is closed, ValueError if the message is malformed.
    """
    received = _read(one, _SIZES.size, check_time)
    text_size, data_size = _SIZES.unpack_from(received)
    start, size = _SIZES.size + text_size, _SIZES.size + text_size + data_size
    if size > _MAX_MESSAGE:
        raise ValueError
    if len(received) < size:
        received += _read(one, size - len(received), check_time)
    header = json.loads(received[_SIZES.size : start])
    if not isinstance(header, dict) or len(received) > size:
        raise ValueError
    return header, received[start:]


def _read(one: socket.socket, least: int, check_time: Callable[[], None]) -> bytes:
    """Return at least so many bytes, and what else has come with them."""
    parts: list[bytes] = []
    while least > 0:
        check_time()
        with suppress(TimeoutError):
            part = one.recv(_PART)
            if not part:
                raise EOFError
            parts.append(part)
            least -= len(part)
    return b"".join(parts)


def serve(functions: Mapping[str, Callable[[dict[str, Any], bytes], Answer]]) -> None:
    """Answer calls until the parent is gone; called in the child."""
    what = sys.argv[3]
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, _MAX_LOG)
    _limit(resource.RLIMIT_AS, MEMORY)
    _die_first()
    parent = socket.socket(fileno=0)
    while True:
        try:
            header, data = _receive(parent, _no_limit)
        except EOFError:
            return
        # The limit counts the CPU time of the whole process, so each call raises it.
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + int(header["cpu_s"]))
        try:
            answer, data = functions[header["call"]](header, data)
        except RKEdgeError as error:
            answer, data = error.as_dict(), b""
        except ImportError as error:
            answer, data = import_failed(error).as_dict(), b""
        except MemoryError:
            answer, data = _failed(f"{what} took more than {MEMORY >> 20} MiB of memory"), b""
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # A panic in tokenizers is not an Exception. Its text may quote a conversation.
            answer, data = _failed(f"{what} failed ({type(error).__name__})"), b""
        _send(parent, json.dumps(answer).encode(), data, _no_limit)


def _no_limit() -> None:
    return None


def _failed(how: str) -> dict[str, Any]:
    return BundleError(f"{how}.", hint=_HINT).as_dict()


def _limit(kind: int, value: int) -> None:
    # Only the soft limit, which can be raised again.
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _die_first() -> None:
    """Have the kernel kill this process first if memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 - the child imports little
            file.write("1000")
    except OSError:
        pass
