"""The daemon's settings. configs/daemon.yaml lists each of them with its default, which a test checks."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from rkruntime.checks.preflight import Context
from rkruntime.engine.generation import RepeatPenalty, Sampling, Temperature, TopK, TopP
from rkruntime.errors import UsageError
from rkruntime.files import path_hint, read_regular
from rkruntime.folders import own_folder
from rkruntime.schema import Between, Length, build, types_of
from rkruntime.serve.users import is_free, key_user
from rkruntime.yamltext import MAX_FILE, read_mapping

SYSTEM_SOCKET: Final = Path("/run/rkedge/rkedge.sock")
SOCKET_VARIABLE: Final = "RKEDGE_SOCKET"
# When a reload applies a setting: at once, by reloading the model, with the next load, or only after a restart.
Taken = Literal["now", "load", "next load", "restart"]
_MIN_KEY: Final = 16
# An origin as a browser writes it: no path, no user, no wildcard, no opaque `null`.
_ORIGIN: Final = re.compile(
    r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:\d{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:.]+\](:\d{1,5})?"
)
_KEY_HINT: Final = "Generate one: openssl rand -hex 24"
_NAME_HINT: Final = (
    "Names may have letters, digits, dot, dash and underscore. network, local, uid-... and key-... are reserved."
)

# Types of values with generous ranges; a time limit of 0 would end everything at once.
_Seconds = Annotated[float, Between(0, 1_000_000_000)]
_Time = Annotated[float, Between(0.001, 1_000_000_000)]
_Megabytes = Annotated[float, Between(0, 1 << 30)]
_Word = Annotated[str, Length(256, least=1)]
_Count = Annotated[int, Between(0, 1_000_000)]
_Tokens = Annotated[int, Between(0, 1 << 20)]


@dataclass(frozen=True)
class Listen:
    """Where clients connect.

    Attributes:
        socket: path of the Unix socket; null is the service's place or the user's own, see `default_socket`.
        socket_mode: permissions of the socket, in octal; by default its group may connect.
        host: TCP address, used with a port; any address but loopback requires `api_keys`.
        port: TCP port; null is no TCP, 0 any free port.
        api_keys: file with `NAME KEY`, or a key alone, on each line, readable only by its owner; TCP clients need a
            key, those of the Unix socket do not.
        origins: other web pages that may send requests from a browser, such as `http://localhost:3000`; each one can
            then read and change every conversation of the users whose browsers open it.
    """

    socket: Path | None = None
    socket_mode: str = "0660"
    host: _Word = "127.0.0.1"
    port: int | None = None
    api_keys: Path | None = None
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How much all clients together may take. One user may have a quarter of `queue`, `memory_mb` and
    `connections`.

    Attributes:
        queue: requests that may wait for the NPU.
        wait_s: how long a request may wait for the NPU.
        request_s: how long an answer may take once it has its turn.
        load_s: how long a load may take; longer for a large file and while it is read.
        token_s: how long a token may take, including the prefill of a long prompt, before the worker counts as hung and
            is killed.
        body_mb: largest body of a request.
        memory_mb: memory for the bodies and large answers of all requests being answered; a user's only request always
            gets what it needs.
        header_s: how long a client may take to send its whole request.
        write_s: how long a client may read nothing of its answer before it is cut off.
        connections: connections open at the same time, for each listener.
        stop_s: how long running answers may go on when the daemon is stopped.
        max_new_tokens: longest answer; 0 is what the context has room for.
    """

    queue: _Count = 64
    wait_s: _Seconds = 120.0
    request_s: _Time = 600.0
    load_s: _Time = 600.0
    token_s: _Time = 120.0
    body_mb: Annotated[float, Between(0.001, 1024)] = 4.0
    memory_mb: Annotated[float, Between(1, 1 << 16)] = 64.0
    header_s: _Time = 20.0
    write_s: _Time = 20.0
    connections: Annotated[int, Between(1, 1_000_000)] = 256
    stop_s: _Seconds = 30.0
    max_new_tokens: _Tokens = 0


@dataclass(frozen=True)
class Sessions:
    """Conversations that the daemon keeps. One user may have a quarter of `max_mb` and `max_number`.

    Attributes:
        folder: where they are kept; null is the state folder of the service or the user.
        max_mb: size of all conversations; when a user's share is full, that user's least recently used are deleted.
        max_number: number of all conversations, likewise.
        resume_s: how long an interrupted answer can be resumed.
    """

    folder: Path | None = None
    max_mb: _Megabytes = 64.0
    max_number: _Count = 4000
    resume_s: _Seconds = 3600.0

    @property
    def place(self) -> Path:
        """The folder, configured or default."""
        return self.folder or state_folder("state") / "sessions"


@dataclass(frozen=True)
class PromptCache:
    """Files with the KV cache of conversations that are not on the NPU at the moment.

    Attributes:
        folder: where they are kept; null is the cache folder of the service or the user.
        max_mb: disk quota; 0 is none, null is 512 for runtimes before 1.2.0 and none for later ones, which reuse the
            last conversation's cache on their own. One token of Gemma 2 2B takes about 0.1 MB (26 layers x 4 heads x
            256 x keys and values x 2 bytes).
        min_tokens: shortest prompt to save; shorter ones are quicker to prefill again than to load.
    """

    folder: Path | None = None
    max_mb: _Megabytes | None = None
    min_tokens: _Tokens = 256

    @property
    def place(self) -> Path:
        """The folder, configured or default."""
        return self.folder or state_folder("cache") / "prompts"


@dataclass(frozen=True)
class Settings:
    """All settings.

    Attributes:
        bundle: folder of the model.
        library: librkllmrt.so to load; null is the emulator for its bundles, else the one that is found.
        release: RKLLM release to treat the library as; null is what the library says it is.
        max_context: context length in tokens; null is the model's limit.
        force: load the model even if it is known not to work on this board.
        base_domain_id: the NPU's memory domain, of 4 GB; another one than that of other models on the NPU; null is 0.
        temperature, top_k, top_p, repeat_penalty: sampling where a request does not set it; null is the bundle's own.
        per_request_sampling: what to do with a request's sampling where the runtime, before 1.3.0, cannot change it:
            `ignore` it and say so in a header, or `refuse` the request.
        strict_roles: refuse conversations in which user and assistant do not alternate, instead of joining neighbours.
        tools: what to do with a request whose tools the model may call, as no model here can: `refuse` it, or answer
            without them (`ignore`), which a header says; whoever asks may then believe that something was done.
        idle_unload_s: free the NPU after this long without a request; 0 is never.
        hold_clocks_s: hold the board's clocks at their maximum while an answer is computed, and for this long after it,
            by the unit of docs/clocks.md; 0 leaves them alone.
        load_at_start: load the model at the start, not with the first request.
        log_prompts: write prompts and answers, which are private, to the log.
        log_level: least severe lines to log.
    """

    bundle: Path | None = None
    library: Path | None = None
    release: _Word | None = None
    max_context: Context | None = None
    force: bool = False
    base_domain_id: Annotated[int, Between(0, 15)] | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    repeat_penalty: RepeatPenalty | None = None
    per_request_sampling: Literal["ignore", "refuse"] = "ignore"
    strict_roles: bool = False
    tools: Literal["refuse", "ignore"] = "refuse"
    idle_unload_s: _Seconds = 0.0
    hold_clocks_s: _Seconds = 0.0
    load_at_start: bool = True
    log_prompts: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    listen: Listen = field(default_factory=Listen)
    limits: Limits = field(default_factory=Limits)
    sessions: Sessions = field(default_factory=Sessions)
    prompt_cache: PromptCache = field(default_factory=PromptCache)


# Which settings a reload applies at once, which ones mean another model, and which ones the next load takes. All others
# are applied when the daemon starts, and a reload names those that were changed.
_TAKEN: Final[Mapping[Taken, frozenset[str]]] = {
    "now": frozenset(
        {
            "per_request_sampling",
            "strict_roles",
            "tools",
            "idle_unload_s",
            "hold_clocks_s",
            "log_prompts",
            "log_level",
            "listen.api_keys",
            "limits.queue",
            "limits.wait_s",
            "limits.request_s",
            "limits.max_new_tokens",
            "sessions.max_mb",
            "sessions.max_number",
            "sessions.resume_s",
        }
    ),
    "load": frozenset(
        {
            "bundle",
            "library",
            "release",
            "max_context",
            "force",
            "base_domain_id",
            *types_of(Sampling),
        }
    ),
    "next load": frozenset({"limits.load_s", "limits.token_s"}),
}


def flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting with its name, such as `limits.queue`."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from flat(value, f"{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def changed(before: Settings, after: Settings, taken: Taken) -> list[str]:
    """Return the names of settings that differ, among those that a reload applies in the way `taken`."""
    old = dict(flat(before))
    return [name for name, value in flat(after) if value != old[name] and how_taken(name) == taken]


def how_taken(name: str) -> Taken:
    """Return when a reload applies a setting."""
    return next((taken for taken, names in _TAKEN.items() if name in names), "restart")


def load_settings(path: Path) -> Settings:
    """Read a settings file. Raises UsageError with the key that is wrong."""

    def fail(what: str) -> UsageError:
        return UsageError(f"{path}: {what}.", hint="See docs/settings.md for the keys.")

    return build(Settings, read_mapping(path, fail), fail)


def default_socket() -> Path:
    """Return the socket where daemon and clients meet by default.

    $RKEDGE_SOCKET; else the service's socket if it exists or its folder is writable; else the user's own, in
    $XDG_RUNTIME_DIR.
    """
    named = os.environ.get(SOCKET_VARIABLE)
    if named:
        return Path(named)
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if not runtime.is_absolute() or SYSTEM_SOCKET.exists() or os.access(SYSTEM_SOCKET.parent, os.W_OK):
        return SYSTEM_SOCKET
    return runtime / "rkedge" / "rkedge.sock"


def state_folder(kind: Literal["state", "cache"]) -> Path:
    """Return the service's folder (systemd's $STATE_DIRECTORY, $CACHE_DIRECTORY) or the user's own."""
    given = os.environ.get(f"{kind.upper()}_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else own_folder(kind)


@lru_cache(maxsize=8)  # each request names a host
def is_loopback(host: str) -> bool:
    """Whether `host` cannot be reached from another machine. Names are case-insensitive and may end with a dot."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().removesuffix(".") == "localhost"


def read_keys(path: Path) -> dict[str, str]:
    """Read the user of each API key from a file with `NAME KEY` or a key on each line; # begins a comment line.

    Raises:
        UsageError: The file cannot be read, others can read it too, a key is too short to be safe, is not ASCII or
            has two users, or a name cannot be a user's.
    """
    try:
        mode = path.stat().st_mode
        lines = read_regular(path, MAX_FILE).decode().splitlines()
    except OSError as error:
        raise UsageError(
            f"The API keys in {path} cannot be read: {error.strerror or error}.", hint=path_hint(error, path)
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The API keys in {path} cannot be read: they are not UTF-8.", hint=_KEY_HINT) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"Others can read the API keys in {path}.", hint=f"chmod 600 {path}")
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        *names, key = words
        if len(names) > 1 or not all(map(is_free, names)):
            raise UsageError(f"{path}, line {number}: expected NAME KEY, or a key alone.", hint=_NAME_HINT)
        if not key.isascii():
            raise UsageError(f"{path}, line {number}: the key is not ASCII, so no header can carry it.", hint=_KEY_HINT)
        user = names[0] if names else key_user(key)
        if len(key) < _MIN_KEY or keys.setdefault(key, user) != user:
            what = "has two users" if key in keys else f"has fewer than {_MIN_KEY} characters"
            raise UsageError(f"{path}, line {number}: the key {what}.", hint=_KEY_HINT)
    if not keys:
        raise UsageError(f"{path} has no key.", hint=_KEY_HINT)
    return keys


def check_listen(listen: Listen) -> dict[str, str]:
    """Check the settings; returns the user of each accepted API key, empty without a file. Raises UsageError."""
    if listen.port is not None and not 0 <= listen.port <= 65535:
        raise UsageError(f"listen.port is {listen.port}; ports range from 0 (any free one) to 65535.")
    try:
        mode = int(listen.socket_mode, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError(f"listen.socket_mode is {listen.socket_mode!r}; write it in octal, as in '0660'.")
    for origin in listen.origins:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"listen.origins has {origin[:80]!r}.",
                hint="Write each as http://HOST:PORT or https://HOST, without a path.",
            )
    if listen.api_keys is not None:
        return read_keys(listen.api_keys)
    if listen.port is not None and not is_loopback(listen.host):
        raise without_keys(listen.host)
    return {}


def without_keys(address: str) -> UsageError:
    """Return the error for a daemon that others can reach and that would let everyone in."""
    return UsageError(
        f"{address} can be reached from other machines, but there are no API keys.",
        hint="Set listen.api_keys (--api-keys FILE), or, better, stay with the Unix socket and use SSH.",
    )
