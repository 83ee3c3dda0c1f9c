"""The parent's side of the worker: start it, send commands, read records and log lines, and end it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from rkruntime.engine.worker import protocol
from rkruntime.engine.worker.command_pipe import CommandPipe
from rkruntime.engine.worker.exchange import Exchange
from rkruntime.engine.worker.protocol import Record
from rkruntime.errors import HostError, WorkerCrashedError, WorkerHungError
from rkruntime.owner import Owner
from rkruntime.printable import one_line
from rkruntime.words import counted

_ROOT: Final = str(Path(__file__).resolve().parents[3])
# Run with -I: PYTHONPATH, the working folder and site-packages do not affect what the worker imports.
_START: Final = "import sys; sys.path.insert(0, sys.argv.pop(1)); import rkruntime.engine.worker.__main__"
_PIPE: Final = 1 << 20
_LOG_READ: Final = 1 << 16
_KEPT_LINES: Final = 200
_LONGEST_LINE: Final = 16384
_SLICE: Final = 0.5
# Seconds between reads of a busy log. If more than _LOG_READ bytes are printed in this time, some may be lost.
LOG_PAUSE: Final = 0.02
# Seconds: ample, as a thread of the worker only reads commands, and the pipe holds most of them whole.
_COMMAND_TIMEOUT: Final = 10.0
# Seconds for killing everything that a worker started. It takes longer only if a process hangs in the kernel.
_KILL_TIMEOUT: Final = 5.0
# Lines after which the library continues a run or waits forever, but its answer is garbage (rknn-llm issues 390, 449,
# 85, 306).
_ALARM: Final = re.compile(
    rb"matmul\(\w+\) run failed|failed to submit|failed to wait job|failed to sync memory|meet unkown shape"
)
# Bytes per read. A buffer of a megabyte is mapped anew for each read, at 6 us: worth it for arrays, not for tokens.
SMALL_READ: Final = 1 << 12
_LARGE_READ: Final = 1 << 20
_HEAD: Final = protocol.RECORD.size
_unpack: Final = protocol.RECORD.unpack_from
# As Record(...), without a function of Python's.
_record: Final[Callable[[tuple[int, int, int, int, bytes]], Record]] = partial(tuple.__new__, Record)
# Maps the limit of a wait in seconds, and its end (time.monotonic()), to those that now apply.
Limiting: TypeAlias = Callable[[float, float], tuple[float, float]]
# Processes of workers that were dropped without `close` and had not yet exited at the last check.
_let_go_of: Final[list[subprocess.Popen[bytes]]] = []


class WorkerProcess:
    """A worker process and its three pipes: commands, records, and output.

    Attributes:
        log: The last lines that the worker printed, with control characters escaped.
        printed: Number of lines that the worker has printed in all.
        alarm: The first line since `alarm` was last cleared that says that a run's results are wrong.
        log_open: Whether more lines may follow.
        owner: The process that may use the worker.
        watchers: The reader that watches a descriptor for an event loop, by loop and descriptor.

    Args:
        interpreter: Command line of the Python to use. Raises HostError if it cannot be started.
        environment: The worker's environment.
        on_log: Called with each line that the worker prints.
    """

    def __init__(
        self, interpreter: Sequence[str], environment: Mapping[str, str], on_log: Callable[[str], None] | None = None
    ) -> None:
        self._on_log = on_log
        self.owner = Owner()
        self.log: deque[str] = deque(maxlen=_KEPT_LINES)
        self.printed = 0
        self.alarm = ""
        self.log_open = True
        self.watchers: dict[tuple[object, int], object] = {}
        self._line = b""
        self._buffer = b""
        self._parts: list[bytes] = []
        self._counted = 0
        self._missing = 0
        self._at = 0
        self._exchange = Exchange(0)
        self._head: tuple[int, int, int, int, int] | None = None
        self._wanted = False
        self._left: int | None = None
        self._next_look = 0.0
        self._log_again = 0.0
        with contextlib.ExitStack() as on_error:
            fds = [_no_standard_stream(fd) for _ in range(3) for fd in os.pipe()]
            for fd in fds:
                on_error.callback(_close_quietly, fd)
            command_read, commands, self._records, record_write, self._log, log_write = fds
            # A full log pipe must not block the library: output that does not fit is lost.
            for fd in (commands, self._records, self._log, log_write):
                os.set_blocking(fd, False)
            for fd in (commands, log_write):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE)
            command = [*interpreter, "-c", _START, _ROOT, str(command_read), str(record_write)]
            self.process = _start(command, log_write, (command_read, record_write), environment)
            on_error.pop_all()
        for fd in (command_read, record_write, log_write):
            os.close(fd)
        self._commands = CommandPipe(commands)
        pipes = (commands, self._records, self._log)
        self._forgotten = weakref.finalize(self, _let_go, self.process, pipes, self.owner)
        self._poll = select.poll()
        self._poll.register(self._records, select.POLLIN)
        self._poll.register(self._log, select.POLLIN)
        self._exit = select.poll()
        self._exit.register(self._records, 0)

    @property
    def records_fd(self) -> int:
        """The descriptor that is readable when there may be a record, for an event loop."""
        return self._records

    @property
    def log_fd(self) -> int:
        """The descriptor that is readable when the worker has printed something or exited, for an event loop."""
        return self._log

    @property
    def ended(self) -> bool:
        """Whether the process is known to be gone."""
        return self.process.returncode is not None

    @property
    def exited(self) -> bool:
        """Whether the worker has exited: its pipe shows that before the process above it is gone."""
        return self.process.poll() is not None or bool(self._exit.poll(0))

    def send(self, command: Sequence[bytes | memoryview]) -> None:
        """Send a command (see protocol.pack_command), from any thread.

        Raises:
            RunError: This is a fork, which shares the pipe.
            WorkerCrashedError: The worker is gone.
            WorkerHungError: The worker does not read; it was killed.
        """
        self.owner.check()
        try:
            self._commands.send(command, _COMMAND_TIMEOUT)
        except TimeoutError:
            raise self.hung(_COMMAND_TIMEOUT) from None
        except OSError:
            raise self.crashed() from None

    def expect(self, exchange: Exchange) -> None:
        """Accept only the records of `exchange` from now on."""
        self._exchange, self._wanted = exchange, False

    def buffered(self) -> Record | None:
        """Return the next complete record without a system call. Every record passes through here.

        Raises:
            WorkerProtocolError: The worker must not send this.
        """
        if self._parts:
            self._join()
        while not self._parts:  # parts of a long record: they are joined when the last one has arrived
            start = self._at + _HEAD
            if self._head is None:
                if start > len(self._buffer):
                    self._missing = start - len(self._buffer)
                    return None
                self._head = _unpack(self._buffer, self._at)
                self._wanted = self._exchange.accepts(*self._head)
            kind, batch, run, value, size = self._head
            end = start + size
            if end > len(self._buffer):
                self._missing = end - len(self._buffer)
                return None
            self._head, self._at = None, end
            if self._wanted:
                return _record((kind, batch, run, value, self._buffer[start:end]))
        return None

    def receive(self) -> int:
        """Read what has arrived without waiting: at most SMALL_READ bytes, or the bytes that a record still lacks.

        An interrupt loses no data: Python runs signal handlers between calls, not between assignments.

        Returns:
            The number of bytes. Raises WorkerCrashedError if the worker has exited.
        """
        if self._missing > SMALL_READ or self._left is not None:
            size = min(max(self._missing, SMALL_READ), _LARGE_READ)
            size = size if self._left is None else min(size, self._left)
        else:
            size = SMALL_READ
        try:
            self._parts.extend(map(os.read, (self._records,), (size,)))  # one call, unlike append(os.read(...))
        except BlockingIOError:
            if self._left is None:
                return 0
            raise self.crashed() from None
        except OSError:  # closed by another thread
            raise self.crashed() from None
        parts, end = self._parts, len(self._buffer)
        count = 0 if len(parts) != 1 or self._counted else len(parts[0])
        if count and self._parts is parts and self._at == end and self._missing <= count and self._left is None:
            # As `_join`, for what is mostly read: a token, when nothing else is left. From the check on, there is no
            # call, and so no signal's handler.
            self._buffer, self._at, self._missing, self._parts = parts[0], 0, self._missing - count, []
            return count
        last = self._parts[-1:]  # empty if a signal's handler has read meanwhile
        self._join()
        if last == [b""]:
            raise self.crashed()
        return sum(map(len, last))

    def _join(self) -> None:
        """Count the bytes of the parts that were read; once a record is complete, join all parts to one buffer."""
        while self._counted < len(self._parts):
            count = len(self._parts[self._counted])
            left = None if self._left is None else self._left - count
            self._counted, self._missing, self._left = self._counted + 1, self._missing - count, left
        if self._missing <= 0:  # joined once per record, even an array of megabytes
            joined = b"".join([self._buffer[self._at :], *self._parts])
            self._buffer, self._at, self._parts, self._counted = joined, 0, [], 0

    def next_record(self, timeout: float, deadline: float, limiting: Limiting | None = None) -> Record:
        """Wait for a record until `deadline` (time.monotonic()), at which `timeout` seconds are over.

        Args:
            limiting: Called twice a second for the limit that now applies.

        Raises:
            WorkerCrashedError: The worker ended.
            WorkerHungError: No record came in time; the worker was killed.
            WorkerProtocolError: The worker must not send this.
        """
        record = self.buffered()
        if record is not None:
            return record
        started = now = time.monotonic()
        while record is None:
            wait = 0.0 if now - started < protocol.SPIN else min(_SLICE, max(0.0, deadline - now))
            if self._ready(wait) or self._left is not None:
                self.receive()
                record = self.buffered()
            now = time.monotonic()
            if now > self._next_look:
                self._next_look = now + _SLICE
                self.check_alive()
                timeout, deadline = limiting(timeout, deadline) if limiting else (timeout, deadline)
            if record is None and now > deadline:
                raise self.hung(timeout)
        return record

    def _ready(self, seconds: float) -> bool:
        """Wait for the record pipe; returns whether it can be read. Meanwhile, read the log."""
        if self._log_again and time.monotonic() > self._log_again:
            self._log_again = 0.0
            self._poll.register(self._log, select.POLLIN)
        if self._log_again:
            seconds = min(seconds, LOG_PAUSE)
        found = False
        for fd, _ in self._poll.poll(seconds * 1000):
            if fd != self._log:
                found = True
            elif self.read_log():
                self._poll.unregister(self._log)
                self._log_again = time.monotonic() + LOG_PAUSE
        return found

    def check_alive(self) -> None:
        """Notice that the process has exited, even if one of its children keeps the pipes open.

        Records in the pipe by then still count, but none that come later.
        """
        if self._left is None and self.process.poll() is not None:
            self._left = _waiting(self._records)

    def read_log(self) -> bool:
        """Read a piece of what the worker has printed; returns whether there is likely to be more."""
        try:
            data = os.read(self._log, _LOG_READ)
        except OSError:
            return False
        if not data:  # the writers are gone, so poll would always report the pipe as ready
            self.log_open = False
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._log)
            return False
        self._print(data)
        return len(data) == _LOG_READ

    def drain_log(self) -> None:
        """Read what the worker has printed so far, but nothing that it prints meanwhile."""
        for _ in range(-(-_waiting(self._log) // _LOG_READ)):
            self.read_log()

    def _print(self, data: bytes) -> None:
        # Splitting costs the reader more than printing costs the writer: only the last lines of a flood are split off.
        left_out, *lines = (self._line + data).rsplit(b"\n", _KEPT_LINES + 1)
        if len(lines) <= _KEPT_LINES:
            lines, left_out = [left_out, *lines], b""
        self._line = lines.pop()
        if len(self._line) > _LONGEST_LINE:
            lines.append(self._line)
            self._line = b""
        if left_out:
            self._look_for_alarm(left_out)
            self._keep(f"[{len(left_out):,} bytes of output left out]")
        for line in lines:
            self._look_for_alarm(line)
            self._keep(one_line(line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip("\r")))

    def _look_for_alarm(self, text: bytes) -> None:
        found = None if self.alarm else _ALARM.search(text)
        if found:
            start, end = text.rfind(b"\n", 0, found.start()) + 1, text.find(b"\n", found.end())
            line = text[start : end if end >= 0 else None]
            self.alarm = one_line(line[:_LONGEST_LINE].decode("utf-8", "replace").strip())

    def _keep(self, text: str) -> None:
        self.log.append(text)
        self.printed += 1
        if self._on_log:
            self._on_log(text)

    def end(self, grace: float) -> int:
        """End the process and everything that it started, after `grace` seconds in which it may exit by itself.

        Returns:
            The process's return code, negative for a signal.
        """
        self.kill(grace)
        self.drain_log()
        if self._line:
            self._print(b"\n")
        return self.process.wait()

    def kill(self, grace: float = 0) -> None:
        """The part of `end` that takes time: a process that hangs in a driver may be slow to go. From any thread."""
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # SIGTERM to the keeper: see rkruntime.engine.worker.keeper
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_KILL_TIMEOUT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close_pipes(self) -> None:
        """Close the parent's ends of the pipes."""
        self._forgotten.detach()
        self._commands.close()
        for name in ("_records", "_log"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def crashed(self) -> WorkerCrashedError:
        """End the process, and return the error for a worker that exited."""
        code = self.end(grace=1.0)
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return WorkerCrashedError(
                f"The runtime library crashed ({name}).",
                details={"signal": name, "description": signal.strsignal(-code)},
            )
        return WorkerCrashedError(
            f"The runtime library ended its process with exit code {code}.", details={"exit_code": code}
        )

    def hung(self, seconds: float) -> WorkerHungError:
        """Kill the process, and return the error for a worker that did not respond in time."""
        self.end(grace=0)
        return WorkerHungError(
            f"The runtime library did not respond for {counted(seconds, 'second')} and was killed.",
            details={"seconds": seconds},
        )


def _start(
    command: Sequence[str], output: int, fds: tuple[int, int], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    _let_go_of[:] = [process for process in _let_go_of if process.poll() is None]
    # A session of its own: Ctrl-C in the terminal reaches only the parent, and the whole session can be killed at once.
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=fds,
            env=dict(environment),
            start_new_session=True,
        )
    except OSError as error:
        raise HostError(
            f"The worker process cannot be started: {command[0]}: {error.strerror or error}.",
            hint="Check that this Python still exists, and the limits on processes, memory and files (ulimit -a).",
        ) from error


def _let_go(process: subprocess.Popen[bytes], pipes: tuple[int, ...], owner: Owner) -> None:
    """End a worker that was dropped without `close`, without waiting for it; in a fork, only close the pipes."""
    for fd in pipes:
        _close_quietly(fd)
    if owner.here:
        process.terminate()
        _let_go_of.append(process)


def _no_standard_stream(fd: int) -> int:
    """Move a pipe's end to a number above 2: it may have a standard stream's number, if ours were closed."""
    if fd > 2:
        return fd
    higher = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return higher


def _waiting(fd: int) -> int:
    """Return the number of bytes in a pipe; 0 if it is closed."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    except (OSError, ValueError):
        return 0


def _close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
