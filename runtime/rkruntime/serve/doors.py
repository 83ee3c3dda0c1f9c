"""The listeners, and how each of them identifies users.

What a request may do depends on the listener that accepted its connection. A listener identifies the sender only by
what it knows for sure: the kernel's word for a Unix socket, a key for TCP. An address decides no more than whose idle
connection gives way first.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import socket
import struct
import time
from collections.abc import Collection, Hashable, Mapping
from typing import Final, Protocol

from starlette.datastructures import Headers

from rkruntime.errors import BodyError, UsageError
from rkruntime.serve.settings import is_loopback, without_keys
from rkruntime.serve.users import NETWORK, User, login_name, may_name, named

USER_HEADER: Final = "x-rkedge-user"
_CREDENTIALS: Final = struct.Struct("3i")
# Seconds for which a user id's login name is cached.
_KNOWN_S: Final = 60.0
# Prefix of headers that a browser adds to a request and no page can remove.
_FETCH: Final = "sec-fetch-"
_OTHER_NAME: Final = "Call it localhost; with listen.api_keys, which a client in a container needs, any name will do."
_OTHER_PAGE: Final = "The setting listen.origins names pages that may (docs/settings.md)."


class Door(Protocol):
    """A listener.

    Attributes:
        keys: User of each API key; the mapping may be replaced at any time.
    """

    listener: socket.socket
    keys: Mapping[str, str]

    @property
    def any_host(self) -> bool:
        """Whether a client may call the daemon by any name.

        Only a key keeps out a web page that resolves its own name to this machine (DNS rebinding).
        """

    def peer(self, connection: socket.socket) -> Hashable:
        """Return whose connection this is, as far as known before anything is sent; connections are counted by peer."""

    async def user(self, peer: Hashable, headers: Headers) -> User:
        """Return the sender of a request. Raises BodyError (401, 403)."""

    def check(self, keys: Mapping[str, str]) -> None:
        """Raise UsageError if the listener may not be used with these keys."""


class UnixDoor:
    """A Unix socket: its permissions control access, and the kernel identifies the client's user."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.keys: Mapping[str, str] = {}
        self._accounts: dict[int, tuple[float, asyncio.Future[str]]] = {}

    @property
    def any_host(self) -> bool:
        """False, as there may be a browser behind a tunnel."""
        return False

    def peer(self, connection: socket.socket) -> int:
        """Return the id of the user who made the connection (SO_PEERCRED)."""
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(found)[1])

    async def user(self, peer: Hashable, headers: Headers) -> User:
        """Return the user by login name; root and the daemon's own user may act for whomever they name."""
        assert isinstance(peer, int)
        return named(await self._account(peer), _name(headers), trusted=may_name(peer))

    async def _account(self, uid: int) -> str:
        """Return a login name, cached for a minute; concurrent requests of a user share a look-up."""
        until, name = self._accounts.get(uid, (0.0, None))
        if name is None or time.monotonic() > until:
            name = asyncio.ensure_future(asyncio.to_thread(login_name, uid))
            self._accounts[uid] = time.monotonic() + _KNOWN_S, name
        return await asyncio.shield(name)

    def check(self, keys: Mapping[str, str]) -> None:
        """Do nothing: keys are for TCP."""


class TcpDoor:
    """A TCP socket: a key identifies the user; without keys, on loopback only, everyone is one user.

    Args:
        keys: User of each key.

    Raises:
        UsageError: Others can reach it, but there are no keys.
    """

    def __init__(self, listener: socket.socket, keys: Mapping[str, str]) -> None:
        self.listener = listener
        self.keys: Mapping[str, str] = {}
        self.check(keys)
        self.keys = keys
        # Accepted connections inherit this. asyncio does not set it on sockets whose protocol number is 0; the end of
        # each answer would wait for the client's delayed acknowledgement, 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def any_host(self) -> bool:
        """See Door."""
        return bool(self.keys)

    def peer(self, connection: socket.socket) -> str:
        """Return the client's address or /64 network, since a host with one IPv6 address has 2^64 of them."""
        try:
            address: str = connection.getpeername()[0]
            if connection.family == socket.AF_INET:
                return address
            return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
        except (OSError, ValueError):
            # The client is gone already.
            return ""

    async def user(self, peer: Hashable, headers: Headers) -> User:
        """Return the user of the key. Raises BodyError for a missing or wrong key, or if another user is named."""
        account = self._user_of_key(headers) if self.keys else NETWORK
        if account is None:
            raise refused(401, "invalid_api_key", "A key is required: Authorization: Bearer KEY.")
        if _name(headers) not in (None, account):
            raise refused(403, "user", f"This client is {account}, and may not act for others.")
        return User(account)

    def _user_of_key(self, headers: Headers) -> str | None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        # Compare with every key, each in constant time.
        fits = [user for known, user in self.keys.items() if hmac.compare_digest(given, known.encode())]
        return fits[0] if fits and kind.lower() == "bearer" else None

    def check(self, keys: Mapping[str, str]) -> None:
        """See Door. A keys file that an editor has just emptied must not let everyone in."""
        if self.keys and not keys:
            raise UsageError(
                "The settings name no API keys, but the TCP port was opened for those who have one.",
                hint="Set listen.api_keys again, or restart the daemon to do without keys.",
            )
        address = self.listener.getsockname()[0]
        if not keys and not is_loopback(address):
            raise without_keys(address)


def door_of(listener: socket.socket, keys: Mapping[str, str]) -> Door:
    """Return the Door for a listening socket. Raises UsageError if the daemon cannot use the socket."""
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError(
            f"The daemon was given a socket ({listener.type!r}) that is not a listening stream socket.",
            hint="The socket unit needs ListenStream= and Accept=no: see board/systemd/rkedge.socket.",
        )
    if listener.family == socket.AF_UNIX:
        return UnixDoor(listener)
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        return TcpDoor(listener, keys)
    raise UsageError(f"The daemon listens on Unix sockets and TCP, not on {listener.family!r}.")


def refused(status: int, code: str, message: str, hint: str = "See docs/serve.md.") -> BodyError:
    """Return the error for a request that is not let in."""
    return BodyError(message, hint=hint, details={"status": status, "code": code})


def check_page(headers: Headers, *, any_host: bool, target: str | None = None, origins: Collection[str] = ()) -> None:
    """Reject requests that foreign web pages make a browser send.

    A browser lets any page send requests to this machine: directly, through a tunnel, or by a name that resolves to it
    (DNS rebinding). Host, Origin and Sec-Fetch-Site give such requests away. A body of a type that a browser sends
    without a preflight is accepted only from programs such as curl, whose -d means `application/x-www-form-urlencoded`.

    Args:
        any_host: Whether every Host is accepted.
        target: Host in the request's target, if that is a whole URL; checked like the header.
        origins: Origins of other pages that may send requests.

    Raises:
        BodyError: The request is refused (403), or its body's type is (415).
    """
    host = headers.get("host", "").lower()
    for name in dict.fromkeys(map(_host, (host, host if target is None else target))):
        if not any_host and not is_loopback(name):
            raise refused(403, "host", f"This daemon does not answer to the name {name[:80]!r}.", _OTHER_NAME)
    own, given = {f"http://{host}", f"https://{host}"}, headers.getlist("origin")
    named = len(given) == 1 and given[0] in origins
    sites = set() if named else set(headers.getlist("sec-fetch-site"))
    if not (named or own.issuperset(given)) or not {"same-origin", "none"}.issuperset(sites):
        raise refused(403, "origin", "Requests from other web pages are refused.", _OTHER_PAGE)
    if from_browser(headers) and _has_body(headers) and not _is_json(headers):
        raise refused(415, "content_type", "A browser's request needs Content-Type: application/json.")


def from_browser(headers: Headers) -> bool:
    """Whether a browser sent a request: browsers set one of these headers, old ones only the last."""
    return (
        "origin" in headers
        or any(name.startswith(_FETCH) for name in headers.keys())  # noqa: SIM118 - Headers is not a dict
        or headers.get("user-agent", "").startswith("Mozilla/")
    )


def _name(headers: Headers) -> str | None:
    """Return the user that the client acts for, if it names one. Raises BodyError."""
    names = headers.getlist(USER_HEADER)
    if not names:
        return None
    if len(names) > 1 or from_browser(headers):
        raise refused(403, "user", "X-RKEdge-User takes one name, and is not for browsers.")
    return names[0]


def _host(value: str) -> str:
    """Return the name or address in a Host header, without port and brackets."""
    match = re.fullmatch(r"\[([^\]]*)\](?::\d+)?|([^:]*)(?::\d+)?", value)
    return (match[1] or match[2] or "") if match else ""


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _is_json(headers: Headers) -> bool:
    kinds = headers.getlist("content-type")
    return [kind.partition(";")[0].strip().lower() for kind in kinds] == ["application/json"]
