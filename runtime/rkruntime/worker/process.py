"""The parent's side of the worker: starts it, sends commands, reads records and log lines, and ends it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import rkruntime
from rkruntime.errors import HostError, WorkerCrashedError, WorkerHungError
from rkruntime.words import counted
from rkruntime.worker import protocol
from rkruntime.worker.protocol import Record

_ROOT: Final = str(Path(rkruntime.__file__).resolve().parents[1])
# Isolated: neither PYTHONPATH nor the working folder nor site-packages have a say in what the worker imports.
_START: Final = "import sys; sys.path.insert(0, sys.argv.pop(1)); import rkruntime.worker.__main__"
_LOG_PIPE: Final = 1 << 20
_KEPT_LINES: Final = 200
_LONGEST_LINE: Final = 16384
_SLICE: Final = 0.5
# The library says these during a run and goes on, or waits for ever: what it answers then is rubbish (rknn-llm issues
# 390, 449, 85, 306).
_ALARM: Final = re.compile(
    r"matmul\(\w+\) run failed|failed to submit|failed to wait job|failed to sync memory|meet unkown shape"
)
# A buffer of a megabyte is mapped anew for each read, which costs 6 us; arrays have use for it, tokens do not.
SMALL_READ: Final = 1 << 12
_LARGE_READ: Final = 1 << 20
_HEAD: Final = protocol.RECORD.size
_unpack: Final = protocol.RECORD.unpack_from


def python_command() -> tuple[str, ...]:
    """The interpreter of the worker, with its options."""
    return (sys.executable, "-I", "-S", "-B")


class WorkerProcess:
    """A worker process and its three pipes: commands, records, and what it prints.

    `alarm` is the first line since it was emptied that says that a run's results are worth nothing.

    Args:
        interpreter: command of the Python to use. Raises HostError if it cannot be started.
        environment: the worker's variables.
        on_log: gets each line that the worker prints.
    """

    def __init__(
        self, interpreter: Sequence[str], environment: Mapping[str, str], on_log: Callable[[str], None] | None = None
    ) -> None:
        self._on_log = on_log
        self.log: deque[str] = deque(maxlen=_KEPT_LINES)
        self.alarm = ""
        self._line = b""
        self._buffer = b""
        self._parts: list[bytes] = []
        self._missing = 0
        self._at = 0
        with contextlib.ExitStack() as on_error:
            fds = [fd for _ in range(3) for fd in os.pipe()]
            for fd in fds:
                on_error.callback(_close_quietly, fd)
            command_read, self._commands, self._records, record_write, self._log, log_write = fds
            # A full log pipe must not stop the library: what does not fit is lost.
            for fd in (self._records, self._log, log_write):
                os.set_blocking(fd, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(log_write, fcntl.F_SETPIPE_SZ, _LOG_PIPE)
            command = [*interpreter, "-c", _START, _ROOT, str(command_read), str(record_write)]
            self.process = _start(command, log_write, (command_read, record_write), environment)
            on_error.pop_all()
        for fd in (command_read, record_write, log_write):
            os.close(fd)
        self._poll = select.poll()
        self._poll.register(self._records, select.POLLIN)
        self._poll.register(self._log, select.POLLIN)

    @property
    def records_fd(self) -> int:
        """Readable when there may be a record, for an event loop."""
        return self._records

    @property
    def log_fd(self) -> int:
        """Readable when the worker has printed something, and at its end."""
        return self._log

    @property
    def ended(self) -> bool:
        """Whether the process is known to be gone."""
        return self.process.returncode is not None

    def send(self, header: dict[str, Any], data: Sequence[bytes | memoryview] = ()) -> None:
        """Send a command. Raises WorkerCrashedError if the worker is gone."""
        try:
            protocol.write_all(self._commands, *protocol.pack_command(header, data))
        except OSError:
            raise self.crashed() from None

    def buffered(self) -> Record | None:
        """The next record that has arrived whole, without a system call."""
        if self._parts:  # of a long record: `receive` joins them when the last one is here
            return None
        start = self._at + _HEAD
        if start > len(self._buffer):
            self._missing = start - len(self._buffer)
            return None
        kind, batch, run, value, size = _unpack(self._buffer, self._at)
        end = start + size
        if end > len(self._buffer):
            self._missing = end - len(self._buffer)
            return None
        self._at = end
        return Record(kind, batch, run, value, self._buffer[start:end])

    def receive(self) -> int:
        """Read what has arrived, without waiting, SMALL_READ bytes or what a record lacks at the most.

        Returns:
            The number of bytes. Raises WorkerCrashedError at the worker's end.
        """
        try:
            data = os.read(self._records, min(max(self._missing, SMALL_READ), _LARGE_READ))
        except BlockingIOError:
            return 0
        if not data:
            raise self.crashed()
        self._parts.append(data)
        self._missing -= len(data)
        if self._missing <= 0:  # joined once per record, also where it is an array of megabytes
            self._buffer = b"".join([self._buffer[self._at :], *self._parts])
            self._parts.clear()
            self._at = 0
        return len(data)

    def next_record(self, timeout: float) -> Record:
        """Wait for a record.

        Raises:
            WorkerCrashedError: the worker ended.
            WorkerHungError: nothing came in time; the worker was ended.
        """
        record = self.buffered()
        if record is not None:
            return record
        started = time.perf_counter()
        while True:
            waited = time.perf_counter() - started
            if self._ready(0 if waited < protocol.SPIN else min(_SLICE, timeout)) and self.receive():
                record = self.buffered()
                if record is not None:
                    return record
                started = time.perf_counter()
            elif waited > timeout:
                raise self.hung(timeout)
            elif waited > protocol.SPIN:
                self.check_alive()

    def _ready(self, seconds: float) -> bool:
        found = False
        for fd, _ in self._poll.poll(seconds * 1000):
            if fd == self._log:
                self.read_log()
            else:
                found = True
        return found

    def check_alive(self) -> None:
        """Raise WorkerCrashedError if the process has ended, also where a child of its own keeps the pipes open."""
        if self.process.poll() is not None and not self.receive():
            raise self.crashed()

    def read_log(self) -> None:
        """Take over what the worker has printed so far."""
        try:
            while data := os.read(self._log, 1 << 16):
                *lines, self._line = (self._line + data).split(b"\n")
                for line in lines:
                    self._keep(line)
                if len(self._line) > _LONGEST_LINE:
                    self._keep(self._line)
                    self._line = b""
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._log)  # its writers are gone, and it would always be ready
        except OSError:
            return

    def _keep(self, line: bytes) -> None:
        text = line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip("\r")
        self.log.append(text)
        if not self.alarm and _ALARM.search(text):
            self.alarm = text
        if self._on_log:
            self._on_log(text)

    def end(self, grace: float) -> int:
        """End the process and everything that it started; wait `grace` seconds for it to do so itself.

        Returns:
            Its return code, negative for a signal.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.read_log()
        if self._line:
            self._keep(self._line)
            self._line = b""
        return code

    def close_pipes(self) -> None:
        """Close the parent's ends."""
        for name in ("_commands", "_records", "_log"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def crashed(self) -> WorkerCrashedError:
        """The error of a worker that ended; the process is gone afterwards."""
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
        """The error of a worker that gave no sign in time; the process is gone afterwards."""
        self.end(grace=0)
        return WorkerHungError(
            f"The runtime library gave no sign of life for {counted(seconds, 'second')} and was killed.",
            details={"seconds": seconds},
        )


def _start(
    command: Sequence[str], output: int, fds: tuple[int, int], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal is for the parent, and everything in it can be ended at once.
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
            hint="Look at the limits on processes and memory, and that this Python is still where it was.",
        ) from error


def _close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
