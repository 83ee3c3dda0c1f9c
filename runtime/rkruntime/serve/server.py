"""Sockets, signals and the daemon's life: start, reload, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import uvicorn

from rkruntime.errors import HostError, RKEdgeError, UsageError
from rkruntime.serve import systemd
from rkruntime.serve.app import Front, make_app
from rkruntime.serve.connections import Connection, Requests
from rkruntime.serve.doors import door_of
from rkruntime.serve.host import Host
from rkruntime.serve.queue import DAEMON
from rkruntime.serve.service import Service
from rkruntime.serve.settings import Listen, Settings, changed, check_listen, default_socket
from rkruntime.words import counted

log = logging.getLogger("rkedge")

_BACKLOG: Final = 128
_TICK_S: Final = 1.0
_KEEP_ALIVE_S: Final = 15
# Open files beside connections: the worker's pipes, libraries, conversations, listeners.
_OTHER_FILES: Final = 64
_SILENCE_S: Final = 60.0
# The loop gives the interpreter away with each system call, and waits so long to get it back from a thread that reads
# a large body. Python's own 5 ms add up to what a person notices.
_SWITCH_S: Final = 0.001


def unix_socket(path: Path, mode: int) -> socket.socket:
    """A listening Unix socket at `path`, in place of one that nobody listens to any more.

    Raises:
        UsageError: a daemon listens there, or something else stands there.
        HostError: it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_folder(path.parent)
        if path.is_socket():
            _refuse_living(path)
            path.unlink()
        elif path.exists():
            raise UsageError(f"{path} is not a socket and is not replaced.", hint="Name another with --socket.")
        # Nobody gets in between bind and chmod.
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)
        listener.listen(_BACKLOG)
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):
            raise HostError(
                f"The socket {path} cannot be made: {error.strerror or error}.",
                hint="Name one that you may write with --socket, or start the service with systemctl.",
            ) from error
        raise
    return listener


def _make_folder(folder: Path) -> None:
    """Make it and those above it if there are none, so that clients come in and nobody else changes it."""
    before = os.umask(0o022)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(before)


def _refuse_living(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise UsageError(f"A daemon listens on {path} already.", hint="Stop that one, or name another with --socket.")


def tcp_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises HostError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise HostError(
            f"Nothing can listen on {host} port {port}: {error.strerror or error}.", hint="Choose another --port."
        ) from error


def open_sockets(path: Path, listen: Listen) -> list[socket.socket]:
    """The Unix socket at `path`, and TCP if it is asked for. Raises UsageError or HostError."""
    sockets = [unix_socket(path, int(listen.socket_mode, 8))]
    if listen.port is not None:
        sockets.append(tcp_socket(listen.host, listen.port))
    return sockets


def most_connections(wanted: int, listeners: int) -> int:
    """How many each listener may have; raises this process's limit of open files for them as far as it may.

    Beside those that are there, a listener has some that are turned away and not closed yet.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = listeners * (wanted + _BACKLOG) + _OTHER_FILES
    if resource.RLIM_INFINITY in (soft, hard) or soft >= needed:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, needed), hard))
    most = max(1, (hard - _OTHER_FILES) // listeners - _BACKLOG)
    if most < wanted:
        log.warning("limits.connections is %d; with %d open files (ulimit -n) it can be %d only", wanted, hard, most)
    return min(wanted, most)


class _LoopErrors:
    """The event loop's own errors. Each connection for which no file is left is one; one a minute is logged."""

    def __init__(self) -> None:
        self._silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif time.monotonic() > self._silent_until:
            self._silent_until = time.monotonic() + _SILENCE_S
            log.error("no connection can be accepted: %s", error.strerror)


def _inode(path: Path) -> tuple[int, int]:
    state = path.lstat()
    return state.st_dev, state.st_ino


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other daemons. The kernel lets go of it when this one ends, in whatever way.

    Raises:
        UsageError: another daemon holds it.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(folder / ".lock", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            held.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another daemon keeps its files in {folder}.",
                hint="Stop that one, or give this one folders of its own: sessions.folder, prompt_cache.folder.",
            ) from None
        except OSError as error:
            # Chat goes on without, and each write that fails is told then.
            log.warning("nobody keeps other daemons out of %s: %s", folder, error.strerror or error)
        yield


def _name(one: socket.socket) -> str:
    address = one.getsockname()
    return address if isinstance(address, str) else f"http://{address[0]}:{address[1]}"


class _Server(uvicorn.Server):
    """uvicorn's, with the signals left to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Daemon:
    """A service on its sockets.

    Attributes:
        settings: as it was started.

    Args:
        reread: gives the settings anew on SIGHUP.
    """

    def __init__(self, settings: Settings, reread: Callable[[], Settings], host: Host | None = None) -> None:
        self.settings = settings
        self._reread = reread
        # Conversations are nobody else's, whatever the mask of who started this.
        os.umask(os.umask(0o077) | 0o077)
        with contextlib.ExitStack() as on_error:
            self._locks = on_error.enter_context(contextlib.ExitStack())
            # What is in memory of these folders is right only as long as nobody else writes there.
            for folder in {os.path.realpath(settings.sessions.place), os.path.realpath(settings.prompt_cache.place)}:
                self._locks.enter_context(_locked(Path(folder)))
            self.service = Service(settings, host)
            keys = check_listen(settings.listen)
            sockets = systemd.inherited_sockets()
            self._own: tuple[Path, tuple[int, int]] | None = None
            if not sockets:
                path = settings.listen.socket or default_socket()
                sockets = open_sockets(path, settings.listen)
                self._own = path, _inode(path)
            self._doors = [door_of(one, keys) for one in sockets]
            on_error.pop_all()
        self._servers: list[_Server] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reloading = asyncio.Lock()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then let running answers end. SIGHUP reads the settings again."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_LoopErrors())
        sys.setswitchinterval(_SWITCH_S)
        self._servers = self._make_servers()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._start_task, self.reload)
        self._start_task(self._tick)
        if self.settings.load_at_start:
            self._start_task(self._load)
        try:
            systemd.notify("READY=1", f"STATUS=serving {self.service.name}")
            log.info("serving %s on %s", self.service.name, ", ".join(_name(door.listener) for door in self._doors))
            await asyncio.gather(
                *(server.serve([door.listener]) for server, door in zip(self._servers, self._doors, strict=True))
            )
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.service.host.close()
            self._remove_socket()
            self._locks.close()
            log.info("stopped")

    def _make_servers(self) -> list[_Server]:
        """One for each listener, so that none has a part in another's connections."""
        limits = self.settings.limits
        app, requests = make_app(self.service), Requests(limits.connections, int(limits.memory_mb * 1e6))
        most = most_connections(limits.connections, len(self._doors))
        return [
            _Server(
                uvicorn.Config(
                    Front(app, door, requests),
                    http=Connection.of(door, most, limits.header_s, limits.write_s),
                    loop="asyncio",
                    ws="none",
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    proxy_headers=False,
                    backlog=_BACKLOG,
                    timeout_keep_alive=_KEEP_ALIVE_S,
                    timeout_graceful_shutdown=max(1, round(limits.stop_s)),
                )
            )
            for door in self._doors
        ]

    def _start_task(self, work: Callable[[], Any]) -> None:
        task = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self) -> None:
        if not any(server.should_exit for server in self._servers):
            systemd.notify("STOPPING=1", "STATUS=answers come to their end")
            log.info("stopping: running answers have %g s", self.settings.limits.stop_s)
        self.service.host.stop()
        for server in self._servers:
            server.should_exit = True

    async def _load(self) -> None:
        """Load before the first request asks for it. What goes wrong is in the log, in /ready and in answers."""
        with contextlib.suppress(RKEdgeError):
            async with self.service.queue.turn(DAEMON):
                await self.service.host.model()

    async def _tick(self) -> None:
        beat = systemd.watchdog_s()
        while True:
            await asyncio.sleep(min(_TICK_S, beat or _TICK_S))
            if beat:
                systemd.notify("WATCHDOG=1")
            for server in self._servers:
                for connection in list(server.server_state.connections):
                    cast("Connection", connection).check_writing()
            await self.service.unload_if_idle()

    async def reload(self) -> None:
        """Read the settings again. What does not fit leaves the old ones in force; sockets stay as they are.

        Keys and limits wait for nothing; another model waits for the NPU.
        """
        systemd.reloading()
        try:
            settings = self._take()
            async with self._reloading:
                await self._change_model(settings)
        except RKEdgeError as error:
            log.error("the settings were not taken: %s %s", error.message, error.hint)
        finally:
            systemd.notify("READY=1", f"STATUS=serving {self.service.name}")

    def _take(self) -> Settings:
        """The settings anew; those that need no model are in force. Raises UsageError, and then none is."""
        settings = self._reread()
        keys = check_listen(settings.listen)
        for door in self._doors:
            door.check(keys)
        for door in self._doors:
            door.keys = keys
        self.service.take(settings)
        logging.getLogger("rkedge").setLevel(settings.log_level.upper())
        log.info("keys and limits were taken from the settings; %s", counted(len(keys), "API key"))
        if late := changed(self.settings, settings, "restart"):
            log.warning("restart the daemon to have it take %s", ", ".join(late))
        return settings

    async def _change_model(self, settings: Settings) -> None:
        try:
            await self.service.change_model(settings)
        except RKEdgeError as error:
            log.error("the model of the settings was not taken, all else was: %s %s", error.message, error.hint)
            return
        loaded = self.service.host.loaded_with
        if loaded and (late := changed(loaded, settings, "next load")):
            log.warning("taken when the model is loaded the next time: %s", ", ".join(late))
        log.info("settings read again; serving %s", self.service.name)

    def _remove_socket(self) -> None:
        """Ours; systemd's stays with its unit, and another daemon's that took the place meanwhile with that."""
        if self._own:
            path, inode = self._own
            with contextlib.suppress(OSError):
                if _inode(path) == inode:
                    path.unlink()
