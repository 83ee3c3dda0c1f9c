"""Work on large files in several processes: threads would hand the interpreter lock to each other at every step."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Final, NoReturn, TypeVar

from threadpoolctl import threadpool_limits

from rkconvert.tensors.parallel import WORKERS
from rkruntime.errors import HostError

Item = TypeVar("Item")
Result = TypeVar("Result")
Step = Callable[[int], None]

PROCESSES: Final = WORKERS
# Bytes of work in all for which processes are not worth their start.
LITTLE: Final = 100_000_000
_TELL_EVERY_S: Final = 0.1
_LOOK_EVERY_S: Final = 0.5
_STOP: Final = -1


def in_processes(
    work: Callable[[Item, Step], Result], items: Sequence[Item], advance: Step, nbytes: int
) -> Generator[tuple[Item, Result], None, None]:
    """Work on items in forked processes, one item at a time in each, and yield them with their results when finished.

    Once the generator is closed, no process is at work: the next step of each raises CancelledError there. What `work`
    raises is raised here, and ends the others. Little work, or a single item, is done in this process, as is all work
    where no process can be started.

    Args:
        work: Gets an item, and a function to be called with the bytes of each step. Its result is pickled. It
            must not print, nor take a lock that another thread of this process may hold.
        advance: Gets these bytes, in this process.
        nbytes: Bytes of all steps.

    Raises:
        HostError: A process was killed (its cause is a ChildProcessError).
    """
    left, most = deque(range(len(items))), PROCESSES if nbytes > LITTLE else 1
    crew: dict[Connection, int] = {}
    # The matrix library must not start its own threads beside these processes.
    with threadpool_limits(1, user_api="blas"):
        try:
            while left and len(crew) < min(most, len(items)) > 1 and (hired := _hire(work, items, crew)):
                _order(left.popleft(), hired, crew)
            for index in left if not crew else ():
                yield items[index], work(items[index], advance)
            while crew:
                for one in _heard(crew) or _look_for_ended(crew):
                    message = _received(one, crew)
                    if isinstance(message, int):
                        advance(message)
                        continue
                    index, result = message
                    yield items[index], result
                    if left:
                        _order(left.popleft(), one, crew)
                    else:
                        _dismiss({one: crew.pop(one)})
        finally:
            _dismiss(crew)


def _hire(
    work: Callable[[Item, Step], Result], items: Sequence[Item], crew: dict[Connection, int]
) -> Connection | None:
    """Fork a process that works on the items whose indexes it gets; None if this machine has no room for one."""
    try:
        here, there = Pipe()
    except OSError:
        return None
    parent = os.getpid()
    try:
        with _ctrl_c_later(), warnings.catch_warnings():  # of other threads, whose locks `work` must not take
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
            if not process:
                for inherited in (here, *crew):  # as the end of who reads what is sent ends the sending
                    inherited.close()
                _serve(there, parent, work, items)
            there.close()
            crew[here] = process
    except OSError:
        here.close()
        there.close()
        return None
    finally:
        if os.getpid() != parent:
            os._exit(1)
    return here


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Hold Ctrl-C back: within a fork Python would lose it, and the new process would take it for its own."""
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if came:
            signal.raise_signal(signal.SIGINT)


def _serve(to: Connection, parent: int, work: Callable[[Item, Step], Result], items: Sequence[Item]) -> NoReturn:
    """Work in a forked process until it is told to stop. Ctrl-C is for the process that forked it."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        orders = _Orders(to, parent)
        while (index := orders.next()) != _STOP:
            result = work(items[index], orders.step)
            orders.tell()
            to.send((index, result))
    except BaseException as error:  # whatever it is, it is for the process that forked this one
        _tell_of(error, to)
    finally:
        # Not sys.exit: what that process has yet to print, or to do at its end, is not done here.
        os._exit(0)


class _Orders:
    """What a forked process is told, and tells: the bytes of steps, so rarely that nobody is kept from work.

    That the other end is closed says nothing, as another process that was forked meanwhile may hold a copy of it.
    """

    def __init__(self, to: Connection, parent: int) -> None:
        self._to, self._parent, self._nbytes, self._at = to, parent, 0, time.monotonic()

    def next(self) -> int:
        while os.getppid() == self._parent:
            if self._to.poll(_LOOK_EVERY_S):
                return int(self._to.recv())
        return _STOP

    def step(self, nbytes: int) -> None:
        self._nbytes += nbytes
        if time.monotonic() - self._at > _TELL_EVERY_S:
            if os.getppid() != self._parent or self._to.poll():  # while there is work, no order comes but the last
                raise CancelledError
            self.tell()

    def tell(self) -> None:
        self._to.send(self._nbytes)
        self._nbytes, self._at = 0, time.monotonic()


@dataclass(frozen=True)
class _Failure:
    """An exception, with what pickle leaves out."""

    error: BaseException
    cause: BaseException | None


def _tell_of(error: BaseException, to: Connection) -> None:
    trace = RuntimeError(traceback.format_exc())
    with suppress(OSError):  # nobody listens anymore
        try:
            failure = _Failure(error, error.__cause__ or trace)
            pickle.loads(pickle.dumps(failure))  # noqa: S301 (our own)
        except Exception:  # one of a kind that pickle cannot make again
            failure = _Failure(trace, None)
        to.send(failure)


def _order(index: int, one: Connection, crew: dict[Connection, int]) -> None:
    try:
        one.send(index)
    except ConnectionError:
        _killed(_dismiss({one: crew.pop(one)}))


def _heard(crew: dict[Connection, int]) -> list[Connection]:
    """Return the connections with something to read, or that are closed, as soon as there is one."""
    return [one for one in wait(list(crew), _LOOK_EVERY_S) if isinstance(one, Connection)]


def _received(one: Connection, crew: dict[Connection, int]) -> Any:
    """Return a process's next message. Raises the exception that it raised, or HostError if it was killed."""
    try:
        message = one.recv()
    except (EOFError, OSError):
        _killed(_dismiss({one: crew.pop(one)}))
    if isinstance(message, _Failure):
        raise message.error from message.cause
    return message


def _look_for_ended(crew: dict[Connection, int]) -> tuple[()]:
    """Raise HostError if a process has ended whose end of the connection another process holds."""
    for one, process in crew.items():
        if (status := _status(process, os.WNOHANG)) is not None and not one.poll():
            _killed(status)
    return ()


def _status(process: int, options: int) -> int | None:
    """Return how a process ended, as waitpid does; None if it has not."""
    try:
        ended, status = os.waitpid(process, options)
    except ChildProcessError:  # it was asked for before, or what started this process had it ignore SIGCHLD
        return 0
    return status if ended else None


def _killed(status: int) -> NoReturn:
    number = os.WTERMSIG(status)
    how = signal.strsignal(number) if number else "how, is unknown"
    raise HostError(
        f"A process of the work was ended from outside ({how}).",
        hint="If memory was short, `journalctl -k` names it: close other programs.",
    ) from ChildProcessError(how)


def _dismiss(crew: dict[Connection, int]) -> int:
    """Let processes end; returns how the last one did, as waitpid does."""
    last = 0
    try:
        for one in crew:
            with suppress(OSError):
                one.send(_STOP)
        while crew:
            heard = _heard(crew)
            for one in heard or list(crew):
                # One that is about to say something does not end before it was read.
                if one in heard and _drained(one):
                    continue
                status = _status(crew[one], 0 if one in heard else os.WNOHANG)
                if status is not None:
                    last = status
                    del crew[one]
                    one.close()
    finally:
        for one in crew:
            one.close()
    return last


def _drained(one: Connection) -> bool:
    """Read what was sent; False if the other end is closed."""
    try:
        return bool(os.read(one.fileno(), 1 << 16))
    except ConnectionError:
        return False
