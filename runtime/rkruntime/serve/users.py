"""Who sent a request, and how much of the shared resources one user may take."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rkruntime.errors import BodyError
from rkruntime.words import NAME, NAME_RULE

# Names that the daemon assigns itself, and that users cannot choose.
NETWORK: Final = "network"
_OWN: Final = re.compile(r"network|local|(uid|key)-.*")
_SHARE: Final = 4


def check_name(name: str, what: str) -> str:
    """Return `name` if it can name a file. Raises BodyError."""
    if not NAME.fullmatch(name):
        raise BodyError(
            f"{name[:80]!r} cannot be the name of a {what}: {NAME_RULE}.",
            details={"param": what},
        )
    return name


def is_free(name: str) -> bool:
    """Whether `name` can be a user's, and is not a name that the daemon assigns itself."""
    return bool(NAME.fullmatch(name)) and not _OWN.fullmatch(name)


@dataclass(frozen=True)
class User:
    """Someone with their own conversations.

    Attributes:
        account: What the daemon knows for sure: a login name, the name of a key, `network`.
        name: One of several people behind that account, such as those whose keys have forced commands; empty for the
            account itself. The account's word suffices for this name, because it only divides the account.
    """

    account: str
    name: str = ""

    @property
    def folder(self) -> str:
        """The user's name in files. Accounts and names contain no plus sign, so it is unique."""
        return f"{self.account}+{self.name}" if self.name else self.account

    @property
    def path(self) -> tuple[str, str]:
        """Account, then name: the levels at which shares are counted and turns are taken."""
        return self.account, self.name


def shares(path: tuple[str, ...], whole: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the shares of `whole` for the account and for a name within it: a quarter of the level above, at least 1.

    So no single user can exhaust what others need.
    """
    yield path[:1], max(1, whole // _SHARE)
    if path[1]:
        yield path[:2], max(1, whole // _SHARE**2)


def login_name(uid: int) -> str:
    """Return the login name of a user id, or `uid-N` if there is none usable as a file name. May be slow (LDAP)."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = ""
    return name if is_free(name) else f"uid-{uid}"


def may_name(uid: int) -> bool:
    """Whether a user id may act for any user: root and the daemon's own user can read everyone's files anyway."""
    return uid in (0, os.geteuid())


def named(account: str, name: str | None, *, trusted: bool) -> User:
    """Return the user that a client of `account` acts for.

    Args:
        trusted: Whether the account may act for anyone; otherwise, a name divides the account.

    Raises:
        BodyError: The name is invalid, or reserved for the daemon.
    """
    if name is None or name == account:
        return User(account)
    if not is_free(check_name(name, "user")):
        raise BodyError(f"{name!r} is a name that the daemon assigns itself.", details={"status": 403, "param": "user"})
    return User(name) if trusted else User(account, name)


def key_user(key: str) -> str:
    """Return the user of a key that does not have a name in its file."""
    return f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
