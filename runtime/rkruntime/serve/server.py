"""Sockets, signals and the daemon's life: start, reload, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rkruntime.errors import HostError, RKEdgeError, UsageError
from rkruntime.serve import systemd
from rkruntime.serve.app import Front, make_app
from rkruntime.serve.host import Host
from rkruntime.serve.service import Service
from rkruntime.serve.settings import Listen, Settings, check_listen, default_socket, is_loopback

log = logging.getLogger("rkedge")

_BACKLOG: Final = 128
_TICK_S: Final = 1.0
_KEEP_ALIVE_S: Final = 15


def unix_socket(path: Path, mode: int) -> socket.socket:
    """A listening Unix socket at `path`, in place of one that nobody listens to any more.

    Raises:
        UsageError: a daemon listens there, or something else stands there.
        HostError: it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_socket():
            _refuse_living(path)
            path.unlink()
        elif path.exists():
            raise UsageError(f"{path} is no socket, and is not replaced.", hint="Name another with --socket.")
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


def check_inherited(sockets: Sequence[socket.socket], keys: frozenset[str]) -> None:
    """Raise UsageError if systemd's socket unit listens to the network, and there are no keys."""
    for one in sockets:
        if one.family != socket.AF_UNIX and not keys and not is_loopback(one.getsockname()[0]):
            raise UsageError(f"The socket unit listens on {one.getsockname()[0]}, and there are no API keys.")


def _name(one: socket.socket) -> str:
    address = one.getsockname()
    return address if isinstance(address, str) else f"http://{address[0]}:{address[1]}"


class _Protocol(H11Protocol):
    """uvicorn's, and a time limit for a client that sends its request's head byte by byte, or nothing."""

    header_s = 20.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_expecting()
        elif self._deadline is None:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(self.header_s, self.transport.close)

    def _stop_expecting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    """uvicorn's, with the signals left to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Daemon:
    """A service on its sockets.

    Args:
        reread: gives the settings anew on SIGHUP.
    """

    def __init__(self, settings: Settings, reread: Callable[[], Settings], host: Host | None = None) -> None:
        self.settings = settings
        self._reread = reread
        self.service = Service(settings, host)
        self._keys = check_listen(settings.listen)
        self.front: Front = make_app(self.service, self._keys)
        self._sockets = systemd.inherited_sockets()
        self._own_path: Path | None = None
        if self._sockets:
            check_inherited(self._sockets, self._keys)
        else:
            self._own_path = settings.listen.socket or default_socket()
            self._sockets = open_sockets(self._own_path, settings.listen)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reloading = asyncio.Lock()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then let running answers end. SIGHUP reads the settings again."""
        server = _Server(self._config())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, server)
        loop.add_signal_handler(signal.SIGHUP, self._start_task, self.reload)
        self._start_task(self._tick)
        if self.settings.load_at_start:
            self._start_task(self._load)
        try:
            systemd.notify("READY=1", f"STATUS=serving {self.service.name}")
            log.info("serving %s on %s", self.service.name, ", ".join(map(_name, self._sockets)))
            await server.serve(self._sockets)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.service.host.unload()
            self._remove_socket()
            log.info("stopped")

    def _config(self) -> uvicorn.Config:
        limits = self.settings.limits
        protocol = type("Protocol", (_Protocol,), {"header_s": limits.header_s})
        return uvicorn.Config(
            self.front,
            http=protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(limits.stop_s)),
        )

    def _start_task(self, work: Callable[[], Any]) -> None:
        task = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self, server: uvicorn.Server) -> None:
        if not server.should_exit:
            systemd.notify("STOPPING=1", "STATUS=answers come to their end")
            log.info("stopping: running answers have %g s", self.settings.limits.stop_s)
        server.should_exit = True

    async def _load(self) -> None:
        """Load before the first request asks for it. What goes wrong is in the log, in /ready and in answers."""
        with contextlib.suppress(RKEdgeError):
            async with self.service.queue.turn("daemon"):
                await self.service.host.model()

    async def _tick(self) -> None:
        beat = systemd.watchdog_s()
        while True:
            await asyncio.sleep(min(_TICK_S, beat or _TICK_S))
            if beat:
                systemd.notify("WATCHDOG=1")
            await self.service.unload_if_idle()

    async def reload(self) -> None:
        """Read the settings again. What does not fit leaves the old ones in force; sockets stay as they are."""
        async with self._reloading:
            systemd.reloading()
            try:
                settings = self._reread()
                self._keys = check_listen(settings.listen)
                await self.service.change(settings)
                self.settings, self.front.keys = settings, self._keys
                logging.getLogger("rkedge").setLevel(settings.log_level.upper())
                log.info("settings read again; serving %s", self.service.name)
            except RKEdgeError as error:
                log.error("the settings were not taken: %s %s", error.message, error.hint)
            finally:
                systemd.notify("READY=1", f"STATUS=serving {self.service.name}")

    def _remove_socket(self) -> None:
        """Ours; systemd's stays with its unit."""
        if self._own_path:
            with contextlib.suppress(OSError):
                self._own_path.unlink()
