"""Send commands to the worker, read its replies, and tell how it ended."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from rkruntime.checks import machine
from rkruntime.engine.loading import LoadOptions, environment_of
from rkruntime.engine.worker import protocol
from rkruntime.engine.worker.decode import add_log, error_of, json_of
from rkruntime.engine.worker.exchange import Exchange
from rkruntime.engine.worker.process import Limiting, WorkerProcess
from rkruntime.engine.worker.protocol import Record
from rkruntime.errors import RKEdgeError, RunError, WorkerError

_SHOWN_LINES: Final = 40
# Seconds to wait for another thread that is using the worker, and between checks of whether it closes the model.
_PATIENCE: Final = 1.0
_LOOK: Final = 0.05


class _Turn:
    """See WorkerConnection.turn. A class, because a contextmanager would cost each token 2 us."""

    def __init__(self, connection: WorkerConnection, lock: threading.RLock) -> None:
        self._connection, self._lock, self._pid = connection, lock, os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._pid:  # a fork inherits the lock, but not the thread that holds it
            self._connection.worker.owner.check()
        if not self._lock.acquire(blocking=False):
            self._wait()
        if self._connection.closed:
            self._lock.release()
            raise closed_meanwhile()

    def _wait(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not self._lock.acquire(timeout=_LOOK):
            if self._connection.closing:
                raise closed_meanwhile()
            if time.monotonic() > deadline:
                raise in_use()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._lock.release()
        if isinstance(error, Exception) and not isinstance(error, RKEdgeError) and self._connection.closing:
            # A signal's handler has closed the model between two steps of the reader, which then finds no data.
            raise closed_meanwhile() from error


class WorkerConnection:
    """A worker process that accepts commands until it is closed or lost.

    Attributes:
        closed: Whether the worker is gone.
        closing: Whether the worker is being closed, perhaps by another thread than the one that waits for it.
        gone: The error with which the worker was lost, if it was.
        number: Number of the last command.

    Raises HostError if the worker cannot be started.
    """

    def __init__(self, options: LoadOptions, on_log: Callable[[str], None] | None) -> None:
        self.closed = self.closing = False
        self.gone: WorkerError | None = None
        self._options = options
        self.number = 0
        # The kernel's count of processes killed for lack of memory, when the last command was sent.
        self._kills: int | None = None
        callbacks = {protocol.TOKENIZE: options.tokenizer, protocol.EMBED: options.embed}
        self._questions = [kind for kind, callback in callbacks.items() if callback is not None]
        self._turn = threading.RLock()
        # Number of lines printed by the end of the load, and before the last command.
        self._loaded = self._before = 0
        self._one_turn = _Turn(self, self._turn)
        self.worker = WorkerProcess(options.interpreter, environment_of(options), on_log)

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines that the library printed."""
        if not self.closed and self.worker.owner.here:
            self.worker.drain_log()
        return tuple(self.worker.log)

    def look(self) -> None:
        """Notice that the worker has died since the last run. Call it only between runs."""
        if not self.worker.owner.here or not self._turn.acquire(blocking=False):  # who uses it notices it anyway
            return
        try:
            if self.gone is None and not self.closing and not self.closed and self.worker.exited:
                with contextlib.suppress(RKEdgeError), self.explained():
                    raise self.worker.crashed()
        finally:
            self._turn.release()

    def check(self) -> None:
        """Raise the error of a worker that is gone, or RunError if it was closed or belongs to another process."""
        self.worker.owner.check()
        if self.gone is not None:
            raise type(self.gone)(
                f"The worker is gone: {self.gone.message}", hint="Load the model again.", details=self.gone.details
            )
        if self.closed:
            raise RunError("The model is closed.", hint="Load it again.")
        if self.closing:
            raise closed_meanwhile()

    def send(self, header: dict[str, Any], data: Sequence[bytes | memoryview] = ()) -> None:
        """Send a message outside the exchange, such as an abort, from any thread. Raises WorkerError."""
        self.worker.send(protocol.pack_command(header, data))

    def turn(self) -> _Turn:
        """Return a context manager for being the only thread that waits for the worker.

        Raises RunError if another thread still waits after a second. Never held across an await; a signal's handler may
        enter it again.
        """
        return self._one_turn

    @contextlib.contextmanager
    def last_turn(self, patience: float) -> Iterator[None]:
        """Like `turn`, for closing the model: waits `patience` seconds for others. Raises RunError if they stay."""
        if not self._turn.acquire(timeout=patience):
            raise in_use()
        try:
            yield
        finally:
            self._turn.release()

    def begin(self, header: dict[str, Any], data: Sequence[bytes | memoryview] = (), **expected: Any) -> None:
        """Send a command under the next number; `expected` limits the replies (see Exchange)."""
        self.number += 1
        if header["call"] != "fence":  # a fence only ends the command before it
            self._before = self.worker.printed
        if self.number == 2:
            self._loaded = self.worker.printed
        self._kills = machine.kills_for_memory()
        self.worker.expect(Exchange(self.number, questions=self._questions, **expected))
        self.send({**header, "run": self.number}, data)

    def next(self, timeout: float, deadline: float, limiting: Limiting | None = None) -> Record:
        """Return the next record (see WorkerProcess.next_record), answering the library's callbacks in between."""
        self.worker.owner.check()
        while True:
            record = self.worker.next_record(timeout, deadline, limiting)
            if record.kind < protocol.TOKENIZE or not self.answered(record):
                return record

    def answered(self, record: Record) -> bool:
        """Answer a call of the tokenizer or embedding callback; False if the record is something else."""
        if record.kind < protocol.TOKENIZE:
            return False
        try:
            ok, answer = True, self._ask(record)
        except Exception as error:  # The function is the caller's, and the worker waits for an answer.
            ok, answer = False, f"{type(error).__name__}: {error}".encode()
        self.send({"call": "answer", "run": record.run, "ok": ok}, [answer])
        return True

    def _ask(self, record: Record) -> bytes:
        if record.kind == protocol.TOKENIZE:
            assert self._options.tokenizer is not None
            return array("i", self._options.tokenizer(record.data.decode())).tobytes()
        import numpy as np

        assert self._options.embed is not None
        ids = array("i", record.data).tolist()
        return np.ascontiguousarray(self._options.embed(ids), dtype=np.float32).tobytes()

    def ask(self, header: dict[str, Any], timeout: float, data: Sequence[bytes | memoryview] = ()) -> Any:
        """Send a command and return its reply."""
        self.begin(header, data)
        return self.reply(timeout)

    def reply(self, timeout: float, limiting: Limiting | None = None) -> Any:
        """Return the JSON reply to the last command, or raise the command's error."""
        record = self.next(timeout, time.monotonic() + timeout, limiting)
        if record.kind == protocol.ERROR:
            raise error_of(record)
        return json_of(record)

    def explain(self, error: RKEdgeError) -> None:
        """Add the last log lines and their diagnosis to an error."""
        if isinstance(error, WorkerError):
            self.gone = self.gone or error
        kills = machine.kills_for_memory()
        ran_out = self._kills != kills if None not in (kills, self._kills) else None
        lines = self.log[-_SHOWN_LINES:]
        add_log(error, lines, self._recent(lines), loading=self.number < 2, ran_out=ran_out)

    def _recent(self, lines: Sequence[str]) -> Sequence[str]:
        """Leave out the lines of commands between the load and the last command."""
        first = self.worker.printed - len(lines)
        return [*lines[: max(0, self._loaded - first)], *lines[max(0, max(self._before, self._loaded) - first) :]]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Explain errors raised within, and kill what is left of a lost worker."""
        try:
            yield
        except RKEdgeError as error:
            if self.closing and isinstance(error, WorkerError):  # the thread that closes the model has killed it
                raise closed_meanwhile() from error
            self.explain(error)
            if self.gone is not None:
                self.end()
            raise

    def close(self) -> None:
        """Have the worker unload the model and exit; kill it if it does not do so in time."""
        with contextlib.suppress(RKEdgeError):
            self.begin({"call": "close"})
            self.worker.end(self._options.close_timeout)

    def end(self) -> None:
        """Kill what is left of the worker, unless it belongs to another process. May be called twice."""
        self.closed = True
        if not self.worker.owner.here:
            self.worker.close_pipes()
            return
        self.worker.end(grace=0)
        self.worker.close_pipes()


def in_use() -> RunError:
    """Return the error for using a model that another thread or task is using."""
    return RunError(
        "Another run is in progress: one at a time.",
        hint="Read it to its end, or close its iterator, which an exception that you keep may hold.",
    )


def closed_meanwhile() -> RunError:
    """Return the error for waiting for a model that another thread closes."""
    return RunError("The model was closed before the answer's end.", hint="Load it again.")
