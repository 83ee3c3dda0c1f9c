"""The listeners, and who comes in by each.

What a request may do is decided by the listener that its connection came through, and who sends it by what that
listener knows for sure: the kernel's word for a Unix socket, a key for TCP. An address decides at most whose idle
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
from collections.abc import Hashable, Mapping
from typing import Final, Protocol

from starlette.datastructures import Headers

from rkruntime.errors import BodyError, UsageError
from rkruntime.serve.settings import is_loopback, without_keys
from rkruntime.serve.users import NETWORK, User, login_name, may_name, named

USER_HEADER: Final = "x-rkedge-user"
_CREDENTIALS: Final = struct.Struct("3i")
# Seconds for which a user id keeps its login name.
_KNOWN_S: Final = 60.0
# What a browser adds to a request, and no page can take away.
_FETCH: Final = "sec-fetch-"


class Door(Protocol):
    """A listener.

    Attributes:
        keys: the user of each API key; others may be set from time to time.
    """

    listener: socket.socket
    keys: Mapping[str, str]

    @property
    def any_host(self) -> bool:
        """A client may call the daemon by any name.

        Only a key keeps out a page that was led here by a name of its own (DNS rebinding).
        """

    def peer(self, connection: socket.socket) -> Hashable:
        """Whose connection this is, as far as that is known before anything was sent: connections are counted by it."""

    async def user(self, peer: Hashable, headers: Headers) -> User:
        """Who sends a request. Raises BodyError (401, 403)."""

    def check(self, keys: Mapping[str, str]) -> None:
        """Raise UsageError if the listener cannot be with these keys."""


class UnixDoor:
    """A Unix socket: its permissions let in, and the kernel says whose process is there."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.keys: Mapping[str, str] = {}
        self._accounts: dict[int, tuple[float, asyncio.Future[str]]] = {}

    @property
    def any_host(self) -> bool:
        """Behind a tunnel there may be a browser."""
        return False

    def peer(self, connection: socket.socket) -> int:
        """The user id (SO_PEERCRED) under which the connection was made."""
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(found)[1])

    async def user(self, peer: Hashable, headers: Headers) -> User:
        """The login name; or, for root and the daemon's own user, whom they name."""
        assert isinstance(peer, int)
        return named(await self._account(peer), _name(headers), trusted=may_name(peer))

    async def _account(self, uid: int) -> str:
        """The login name, looked up once a minute; everybody of the same user waits for the same look-up."""
        until, name = self._accounts.get(uid, (0.0, None))
        if name is None or time.monotonic() > until:
            name = asyncio.ensure_future(asyncio.to_thread(login_name, uid))
            self._accounts[uid] = time.monotonic() + _KNOWN_S, name
        return await asyncio.shield(name)

    def check(self, keys: Mapping[str, str]) -> None:
        """Keys are for TCP."""


class TcpDoor:
    """A TCP socket: a key says who is there; without keys, on loopback only, all are one user.

    Args:
        keys: the user of each key.

    Raises:
        UsageError: others can reach it, and there are no keys.
    """

    def __init__(self, listener: socket.socket, keys: Mapping[str, str]) -> None:
        self.listener = listener
        self.check(keys)
        self.keys = keys

    @property
    def any_host(self) -> bool:
        """See Door."""
        return bool(self.keys)

    def peer(self, connection: socket.socket) -> str:
        """The network that the client is in, as one that has an IPv6 address has 2^64 of them."""
        try:
            address = ipaddress.ip_address(connection.getpeername()[0].partition("%")[0])
        except (OSError, ValueError):
            # It has gone already.
            return ""
        return str(ipaddress.ip_network((address, 64 if address.version == 6 else 32), strict=False))

    async def user(self, peer: Hashable, headers: Headers) -> User:
        """The user of the key. Raises BodyError without a right one, and for any other name."""
        account = self._user_of_key(headers) if self.keys else NETWORK
        if account is None:
            raise refused(401, "invalid_api_key", "A key is needed: Authorization: Bearer KEY.")
        if _name(headers) not in (None, account):
            raise refused(403, "user", f"This client is {account}, and may not speak for others.")
        return User(account)

    def _user_of_key(self, headers: Headers) -> str | None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        # Every key is compared, in constant time.
        fits = [user for known, user in self.keys.items() if hmac.compare_digest(given, known.encode())]
        return fits[0] if fits and kind.lower() == "bearer" else None

    def check(self, keys: Mapping[str, str]) -> None:
        """See Door."""
        address = self.listener.getsockname()[0]
        if not keys and not is_loopback(address):
            raise without_keys(address)


def door_of(listener: socket.socket, keys: Mapping[str, str]) -> Door:
    """What a listening socket is. Raises UsageError if it cannot be one of the daemon's."""
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError(
            f"The daemon was given a socket ({listener.type!r}) that does not listen for streams.",
            hint="The socket unit needs ListenStream= and Accept=no: see board/systemd/rkedge.socket.",
        )
    if listener.family == socket.AF_UNIX:
        return UnixDoor(listener)
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        return TcpDoor(listener, keys)
    raise UsageError(f"The daemon listens on Unix sockets and TCP, not on {listener.family!r}.")


def refused(status: int, code: str, message: str) -> BodyError:
    """Why a request is not let in."""
    return BodyError(message, hint="See docs/serve.md.", details={"status": status, "code": code})


def check_page(headers: Headers, *, any_host: bool) -> None:
    """Keep out what web pages of others make a browser send.

    A browser lets any page send requests to this machine, directly, through a tunnel, or by a name that leads here (DNS
    rebinding). It tells by Host, Origin and Sec-Fetch-Site. A body of a type that it would send without asking first is
    taken from programs only, such as curl, whose -d says `application/x-www-form-urlencoded`.

    Raises:
        BodyError: 403, or 415 for the body's type.
    """
    host = headers.get("host", "")
    if not any_host and not is_loopback(_host(host)):
        raise refused(403, "host", f"This daemon does not go by the name {_host(host)[:80]!r}.")
    own = {f"http://{host}", f"https://{host}"}
    if not own.issuperset(headers.getlist("origin")) or not {"same-origin", "none"}.issuperset(
        headers.getlist("sec-fetch-site")
    ):
        raise refused(403, "origin", "Requests from other web pages are refused.")
    if from_browser(headers) and _has_body(headers) and not _is_json(headers):
        raise refused(415, "content_type", "A browser's request needs Content-Type: application/json.")


def from_browser(headers: Headers) -> bool:
    """A browser says so in one of these; old ones in the last alone."""
    return (
        "origin" in headers
        or any(name.startswith(_FETCH) for name in headers.keys())  # noqa: SIM118 - Headers is not a dict
        or headers.get("user-agent", "").startswith("Mozilla/")
    )


def _name(headers: Headers) -> str | None:
    """Whom the client speaks for, if it says so. Raises BodyError."""
    names = headers.getlist(USER_HEADER)
    if not names:
        return None
    if len(names) > 1 or from_browser(headers):
        raise refused(403, "user", "X-RKEdge-User is for one name, and not for browsers.")
    return names[0]


def _host(value: str) -> str:
    """The name or address of a Host header, without port and brackets."""
    match = re.fullmatch(r"\[([^\]]*)\](?::\d+)?|([^:]*)(?::\d+)?", value)
    return (match[1] or match[2] or "") if match else ""


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _is_json(headers: Headers) -> bool:
    kinds = headers.getlist("content-type")
    return [kind.partition(";")[0].strip().lower() for kind in kinds] == ["application/json"]
