"""Sockets, signals and the daemon's life cycle: start, reload, drain, stop."""

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
from rkruntime.files import files_hint
from rkruntime.serve import systemd
from rkruntime.serve.app import guarded, make_app
from rkruntime.serve.connections import Connection, Requests
from rkruntime.serve.doors import door_of
from rkruntime.serve.host import Host
from rkruntime.serve.queue import DAEMON
from rkruntime.serve.service import Service
from rkruntime.serve.settings import SOCKET_VARIABLE, Listen, Settings, changed, check_listen, default_socket
from rkruntime.words import counted

log = logging.getLogger("rkedge")

_BACKLOG: Final = 128
_TICK_S: Final = 1.0
# Seconds that another daemon may take to make its socket.
_ALONE_S: Final = 2.0
_KEEP_ALIVE_S: Final = 15
# Allowance of open files besides connections: the worker's pipes, libraries, conversations, listeners.
_OTHER_FILES: Final = 64
_SILENCE_S: Final = 60.0
# Python's switch interval in seconds: the event loop releases the interpreter for each system call, and waits this long
# to get it back from a thread that parses a large body. The default of 5 ms adds up to a delay that users notice.
_SWITCH_S: Final = 0.001


def unix_socket(path: Path, mode: int) -> socket.socket:
    """Make a listening Unix socket at `path`, replacing a stale one.

    Raises:
        UsageError: A daemon listens there, or there is something other than a socket.
        HostError: The socket cannot be created.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_folder(path.parent)
        with _alone_in(path.parent):
            if path.is_socket():
                _refuse_living(path)
                path.unlink()
            elif path.exists():
                raise UsageError(f"{path} is not a socket, so it is not replaced.", hint="Name another with --socket.")
            # Created with its final mode, so that no one can connect between bind and a chmod.
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
                f"The socket {path} cannot be created: {error.strerror or error}.",
                hint=files_hint(error) or "Choose a writable path with --socket, or start the service with systemctl.",
            ) from error
        raise
    return listener


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep out other daemons that make or remove a socket in this folder, during the block.

    A socket that is bound but does not listen yet looks like a stale one. A folder that cannot be opened, or that
    somebody else keeps locked, is used without a lock.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + _ALONE_S
        while not _tried(handle) and time.monotonic() < deadline:
            time.sleep(_ALONE_S / 100)
        yield
    finally:
        os.close(handle)


def _tried(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _make_folder(folder: Path) -> None:
    """Create a folder and missing parents that clients can enter but only the daemon can change."""
    before = os.umask(0o022)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(before)


def _refuse_living(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # its queue is full: a daemon has it, though it does not answer
            probe.connect(str(path))
        raise UsageError(f"A daemon already listens on {path}.", hint="Stop it, or name another with --socket.")


def tcp_socket(host: str, port: int) -> socket.socket:
    """Make a listening TCP socket. Raises HostError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise HostError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}.",
            hint=files_hint(error) or "Choose another --port.",
        ) from error


def open_sockets(path: Path, listen: Listen) -> list[socket.socket]:
    """Open the Unix socket at `path`, and TCP if configured. Raises UsageError or HostError."""
    # TCP first: if it cannot be opened, no file of the other is left behind.
    tcp = [] if listen.port is None else [tcp_socket(listen.host, listen.port)]
    try:
        return [unix_socket(path, int(listen.socket_mode, 8)), *tcp]
    except BaseException:
        for listener in tcp:
            listener.close()
        raise


def most_connections(wanted: int, listeners: int) -> int:
    """Raise the limit of open files as far as needed and allowed; returns how many connections a listener may have.

    A listener also has some connections that were turned away but are not closed yet.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = listeners * (wanted + _BACKLOG) + _OTHER_FILES
    if resource.RLIM_INFINITY in (soft, hard) or soft >= needed:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, needed), hard))
    most = max(1, (hard - _OTHER_FILES) // listeners - _BACKLOG)
    if most < wanted:
        log.warning("limits.connections is %d; with %d open files (ulimit -n) it can only be %d", wanted, hard, most)
    return min(wanted, most)


class _LoopErrors:
    """Handles the event loop's errors. Of those for lack of file descriptors, one a minute is logged."""

    def __init__(self) -> None:
        self._silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif time.monotonic() > self._silent_until:
            self._silent_until = time.monotonic() + _SILENCE_S
            log.error("no connection can be accepted: %s", error.strerror)


def _inode(path: Path) -> tuple[int, int, int]:
    """Return what identifies a socket's file: a new file may get the inode number of a deleted one."""
    state = path.lstat()
    return state.st_dev, state.st_ino, state.st_mtime_ns


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other daemons. The kernel releases the lock however this daemon ends.

    Raises:
        UsageError: Another daemon holds the lock.
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
                hint="Stop it, or give this one its own folders: sessions.folder, prompt_cache.folder.",
            ) from None
        except OSError as error:
            # Chats work without the folder; each failed write will be reported.
            log.warning("cannot lock %s against other daemons: %s", folder, error.strerror or error)
        yield


def _name(one: socket.socket) -> str:
    address = one.getsockname()
    return address if isinstance(address, str) else f"http://{address[0]}:{address[1]}"


def _user() -> str:
    """Return a user to name in an ssh command: whoever started this, unless it is a service."""
    return "USER" if os.environ.get("INVOCATION_ID") else os.environ.get("USER", "USER")


class _Server(uvicorn.Server):
    """uvicorn's server, with signals and ticks left to the daemon: uvicorn's own loop wakes up ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    async def main_loop(self) -> None:
        """Wait for `stop`. The daemon's tick keeps the Date header up to date."""
        await self.on_tick(0)
        await self._stopping.wait()

    def stop(self) -> None:
        """Accept no more connections, and finish the answers in progress."""
        self.should_exit = True
        self._stopping.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Daemon:
    """A service on its sockets.

    Attributes:
        settings: Settings in force.

    Args:
        reread: Reads the settings again; called on SIGHUP.
    """

    def __init__(self, settings: Settings, reread: Callable[[], Settings], host: Host | None = None) -> None:
        self.settings = settings
        self._reread = reread
        # Conversations are private, whatever umask this process was started with.
        os.umask(os.umask(0o077) | 0o077)
        with contextlib.ExitStack() as on_error:
            self._locks = on_error.enter_context(contextlib.ExitStack())
            # The daemon's index of these folders is valid only while no one else writes there.
            for folder in {os.path.realpath(settings.sessions.place), os.path.realpath(settings.prompt_cache.place)}:
                self._locks.enter_context(_locked(Path(folder)))
            self.service = Service(settings, host)
            keys = check_listen(settings.listen)
            sockets = systemd.inherited_sockets()
            self._own: tuple[Path, tuple[int, int, int]] | None = None
            if not sockets:
                path = settings.listen.socket or default_socket()
                sockets = open_sockets(path, settings.listen)
                self._own = path, _inode(path)
                on_error.callback(self._remove_socket)
            self._doors = [door_of(one, keys) for one in sockets]
            on_error.pop_all()
        self._servers: list[_Server] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reloading = asyncio.Lock()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then let running answers finish. SIGHUP reads the settings again."""
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
            places = [_name(door.listener) for door in self._doors]
            log.info("serving %s on %s", self.service.name, ", ".join(places))
            here = f"{SOCKET_VARIABLE}={own} rkedge chat" if (own := self.settings.listen.socket) else "rkedge chat"
            log.info("chat with it here: %s; from elsewhere: rkedge chat %s@%s", here, _user(), socket.gethostname())
            if pages := [place for place in places if place.startswith("http")]:
                log.info("the chat page, for a browser: %s", ", ".join(pages))
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
        """Make a server for each listener, so that listeners do not share connections."""
        limits = self.settings.limits
        app, requests = make_app(self.service), Requests(limits.connections, int(limits.memory_mb * 1e6))
        most = most_connections(limits.connections, len(self._doors))
        return [
            _Server(
                uvicorn.Config(
                    guarded(app, door, requests, self.settings.listen.origins),
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
            systemd.notify("STOPPING=1", "STATUS=finishing answers")
            log.info("stopping: running answers get %g s", self.settings.limits.stop_s)
        self.service.host.stop()
        for server in self._servers:
            server.stop()

    async def _load(self) -> None:
        """Load the model unless it is loaded. Errors appear in the log, in /ready and in answers."""
        with contextlib.suppress(RKEdgeError):
            async with self.service.queue.turn(DAEMON):
                await self.service.host.bring_back()

    async def _tick(self) -> None:
        beat = systemd.watchdog_s()
        while True:
            await asyncio.sleep(min(_TICK_S, beat or _TICK_S))
            if beat:
                systemd.notify("WATCHDOG=1")
            if self._reloading.locked():  # a model is loaded, perhaps from an SD card
                systemd.still_at_it()
            for server in self._servers:
                await server.on_tick(0)  # the header Date
                for connection in list(server.server_state.connections):
                    cast("Connection", connection).check_writing()
            if self.service.settings.idle_unload_s:  # not waited for, as a model may hang while it is closed
                self._start_task(self.service.unload_if_idle)
            # A request would load it, too, but whoever looks at /ready may send none before.
            if self.service.host.due and not self.service.queue.busy:
                self._start_task(self._load)

    async def reload(self) -> None:
        """Read the settings again. If they are invalid, the old ones stay in force; sockets stay as they are.

        Keys and limits apply at once; another model waits for the NPU.
        """
        systemd.reloading()
        problem: RKEdgeError | None = None
        try:
            settings = self._take()
            async with self._reloading:
                problem = await self._change_model(settings)
        except RKEdgeError as error:
            problem = error
            log.error("the settings were not applied: %s %s", error.message, error.hint)
        finally:
            self.service.reloads += 1
            self.service.reload_error = problem
            systemd.notify("READY=1", f"STATUS=serving {self.service.name}")

    def _take(self) -> Settings:
        """Read the settings and apply those that need no load. Raises UsageError without applying any."""
        settings = self._reread()
        if settings.bundle is None and self.service.settings.bundle is not None:
            raise UsageError(
                "The settings no longer name a bundle.",
                hint="Set bundle again, or stop the daemon: systemctl stop rkedge.",
            )
        keys = check_listen(settings.listen)
        for door in self._doors:
            door.check(keys)
        for door in self._doors:
            door.keys = keys
        self.service.take(settings)
        logging.getLogger("rkedge").setLevel(settings.log_level.upper())
        log.info("keys and limits were applied from the settings; %s", counted(len(keys), "API key"))
        if late := changed(self.settings, settings, "restart"):
            log.warning("restart the daemon to apply %s", ", ".join(late))
        return settings

    async def _change_model(self, settings: Settings) -> RKEdgeError | None:
        """Load the model of the settings; returns the error if it was not changed."""
        try:
            await self.service.change_model(settings)
        except RKEdgeError as error:
            log.error("the model was not changed, all other settings were applied: %s %s", error.message, error.hint)
            return error
        loaded = self.service.host.loaded_with
        if loaded and (late := changed(loaded, settings, "next load")):
            log.warning("applied when the model is next loaded: %s", ", ".join(late))
        log.info("settings read again; serving %s", self.service.name)
        return None

    def _remove_socket(self) -> None:
        """Remove our own socket, but not systemd's, nor another daemon's that has replaced it."""
        if self._own:
            path, inode = self._own
            with contextlib.suppress(OSError), _alone_in(path.parent):
                if _inode(path) == inode:
                    path.unlink()
