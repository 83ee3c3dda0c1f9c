"""A daemon of the user's own in the background: `rkedge up` starts it, `rkedge chat` finds it, `rkedge down` ends it.

A lock tells whether it runs. The daemon's process holds it from its start to its end, so the kernel releases it however
the daemon ends, and as long as it is held, the process id in the file beside it is that of a living daemon.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from rkruntime.chat.attach import fetch
from rkruntime.errors import HostError, RKEdgeError, ServiceError, UsageError
from rkruntime.files import read_regular, write_error
from rkruntime.folders import own_folder
from rkruntime.program import own_command
from rkruntime.serve.settings import SOCKET_VARIABLE, Settings, default_socket, load_settings
from rkruntime.words import counted

PORT: Final = 8080
_HOST: Final = "127.0.0.1"
# Longest path of a Unix socket in bytes, from sun_path in <sys/un.h> without its NUL.
_LONGEST_PATH: Final = 107
_TICK_S: Final = 0.1
_TRIES: Final = 5
# How long a daemon may take to write its process id, and to end once the time that its settings allow is over.
_PATIENCE_S: Final = 10.0
# How long a daemon may leave requests unanswered: a board takes some seconds to start Python.
_SILENCE_S: Final = 60.0
_MOST_LINES: Final = 12
# Writes its own process id to a file, then execs the daemon under the same id.
_SHELL: Final = ("/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"')


class Background:
    """The user's daemon in the background, whether it runs or not.

    Attributes:
        folder: Holds the daemon's files; only the user may read them.
        log: The file with the daemon's output.
    """

    def __init__(self) -> None:
        self.folder = own_folder("state") / "up"
        self.log = self.folder / "log"
        self._settings = self.folder / "daemon.yaml"
        self._pid = self.folder / "pid"
        self._lock_file = self.folder / "lock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        """Whether the daemon's process is alive, whatever it is doing."""
        try:
            handle = os.open(self._lock_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    @property
    def settings(self) -> Settings:
        """The settings of the running daemon, or of the last one. Raises UsageError."""
        return load_settings(self._settings)

    @property
    def socket(self) -> Path:
        """The socket on which a daemon started now listens."""
        path = self.folder / "rkedge.sock"
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        if len(os.fsencode(path)) <= _LONGEST_PATH or not Path(runtime).is_absolute():
            return path
        return Path(runtime) / "rkedge" / "up.sock"

    def start(self, settings: Mapping[str, Any], port: int | None) -> bool:
        """Start a daemon with these settings, on its socket and a port of loopback.

        Args:
            port: None takes the default port, or any free one if that is taken.

        Returns:
            Whether the daemon was started; False if one is already running.

        Raises:
            OutputError, HostError: Its files cannot be written.
            UsageError: A path is not UTF-8.
        """
        with self._lock() as lock:
            if lock is None:
                return False
            listen = {"socket": str(self.socket), "host": _HOST, "port": free_port() if port is None else port}
            # Folders of its own: a folder belongs to one daemon at a time, and the user may run another.
            own = {name: {"folder": str(self.folder / name)} for name in ("sessions", "prompt_cache")}
            text = _as_yaml({**settings, **own, "listen": listen})
            try:
                self._pid.unlink(missing_ok=True)
                self._settings.write_text(text, encoding="utf-8")
                with self.log.open("wb") as log:
                    command = [*_SHELL, str(self._pid), *own_command("serve", "--config", str(self._settings))]
                    self._process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
                        pass_fds=[lock],
                    )  # fmt: skip
            except OSError as error:
                raise write_error(self.folder, error) from error
        return True

    def wait(self) -> Iterator[str]:
        """Wait until the model is loaded; yields what the daemon is doing, several times a second.

        A daemon that was already running may have unloaded or lost its model; it is then asked to load it again.

        Raises:
            ServiceError: The load failed, the daemon ended, or it does not answer.
        """
        heard = time.monotonic()
        asked = self._process is not None  # a daemon started here loads its model unasked
        while True:
            if not self.runs:
                self._reap()
                raise ServiceError(
                    "The daemon ended before the model was loaded.", hint=self._look, details=self._last_lines()
                )
            status = self._fetch("/status")
            state = str(status.get("state", "starting"))
            yield state
            if status:
                heard = time.monotonic()
            elif time.monotonic() - heard > _SILENCE_S:
                silent = counted(_SILENCE_S, "second")
                raise ServiceError(f"The daemon runs, but has not answered for {silent}.", hint=self._look)
            if state == "ready":
                return
            if state == "failed" and asked:
                raise ServiceError(f"The model cannot be loaded: {status.get('error')}", hint=self._look)
            if state in ("failed", "unloaded") and not asked:
                asked = True
                self._fetch("/api/generate", {"model": ""})  # as Ollama's clients load a model
            time.sleep(_TICK_S)

    def _fetch(self, target: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the daemon's answer as a mapping, empty if there is none."""
        try:
            return fetch(self.settings.listen.socket or self.socket, target, body)
        except RKEdgeError:
            return {}

    @property
    def _look(self) -> str:
        return f"Its log has the cause: {self.log}"

    def _last_lines(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return {"lines": self.log.read_text(errors="replace").splitlines()[-_MOST_LINES:]}
        return {}

    def stop(self) -> bool:
        """End the daemon; running answers may finish, for as long as its settings allow. Returns whether one ran.

        Raises:
            HostError: The daemon has not written its process id, or cannot be killed.
        """
        before, allowed = time.monotonic(), 0.0
        asked: int | None = None
        killed = False
        while self.runs:
            pid, waited = self._running_pid(), time.monotonic() - before
            if asked is None and pid is None and waited > _PATIENCE_S:
                raise HostError(f"A daemon holds {self.folder}, but does not say what its process is.", hint=self._look)
            if asked is None and pid is not None:
                asked, allowed = pid, self._allowed_s()
                self._signal(asked, signal.SIGTERM)
            elif pid is not None and pid != asked:  # another daemon was started meanwhile, which was not meant
                break
            elif pid is not None and not killed and waited > allowed:
                killed = True
                self._signal(pid, signal.SIGKILL)
            elif killed and waited > allowed + _PATIENCE_S:
                raise HostError(
                    f"The daemon was killed, but its process {asked} does not end.",
                    hint="It may wait for the NPU's driver: restart the machine.",
                )
            time.sleep(_TICK_S)
        self._reap()
        return asked is not None

    def _reap(self) -> None:
        """Wait for a daemon started here that no longer holds its lock, so that it does not stay as a zombie."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_S)

    def _allowed_s(self) -> float:
        try:
            return self.settings.limits.stop_s + _PATIENCE_S
        except RKEdgeError:
            return _PATIENCE_S

    def _running_pid(self) -> int | None:
        try:
            return int(read_regular(self._pid, 20))
        except (OSError, ValueError):
            return None

    def _signal(self, pid: int, number: int) -> None:
        if self.runs:  # so the id is that of the daemon
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int | None]:
        """Hold the lock and yield its file handle; None if a daemon holds the lock. Raises OutputError or HostError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise write_error(self.folder, error) from error
        try:
            yield handle if _taken(handle) else None
        finally:
            os.close(handle)


def _as_yaml(settings: Mapping[str, Any]) -> str:
    """Return the settings as YAML. Raises UsageError for a path that YAML cannot hold."""
    try:
        json.dumps(settings, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        hint = "Rename the folder; `rkedge chat BUNDLE` and `rkedge serve BUNDLE` take it as it is."
        raise UsageError("A path of this daemon is not UTF-8, as its settings must be.", hint=hint) from None
    return yaml.safe_dump(settings)


def _taken(handle: int) -> bool:
    """Try to lock a file. Retried, because a process that only checks for a daemon holds the lock for an instant."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # noqa: PERF203 - the loop is there to try again
            time.sleep(_TICK_S / _TRIES)
        else:
            return True
    return False


def free_port() -> int:
    """Return the default port, or any free one if that is taken; 0 if there is none."""
    for port in (PORT, 0):
        with contextlib.suppress(OSError), socket.create_server((_HOST, port)) as server:
            return int(server.getsockname()[1])
    return 0


def local_daemon() -> tuple[Path, str]:
    """Return the socket of the daemon on this machine, the user's own or the service's, and where its log is."""
    background = Background()
    if not os.environ.get(SOCKET_VARIABLE) and background.runs:
        with contextlib.suppress(RKEdgeError):
            return background.settings.listen.socket or background.socket, str(background.log)
    return default_socket(), "journalctl -u rkedge"
