"""Whose a request is, and how much of what all share one user may take."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rkruntime.errors import BodyError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Names that the daemon gives itself: nobody else may give them.
NETWORK: Final = "network"
_OWN: Final = re.compile(r"network|local|(uid|key)-.*")
_SHARE: Final = 4


def check_name(name: str, what: str) -> str:
    """`name` if it can name a file. Raises BodyError."""
    if not _NAME.fullmatch(name):
        raise BodyError(
            f"{name[:80]!r} cannot be the name of a {what}: letters, digits, dot, dash and underscore, at most 64.",
            details={"param": what},
        )
    return name


def is_free(name: str) -> bool:
    """`name` can be a user's, and is none that the daemon gives itself."""
    return bool(_NAME.fullmatch(name)) and not _OWN.fullmatch(name)


@dataclass(frozen=True)
class User:
    """Somebody with conversations of their own.

    Attributes:
        account: what the daemon knows for sure: a login name, the name of a key, `network`.
        name: one of several people behind that account, such as those whose keys have forced commands; empty for the
            account itself. The account's word is enough for it, as it divides nothing but the account.
    """

    account: str
    name: str = ""

    @property
    def folder(self) -> str:
        """Names the user in files. No account and no name has a plus sign, so no two users have the same."""
        return f"{self.account}+{self.name}" if self.name else self.account

    @property
    def path(self) -> tuple[str, str]:
        """From the outside in: where shares are counted, and between whom turns are taken."""
        return self.account, self.name


def shares(path: tuple[str, ...], whole: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """What the account, and each name within it, may have of `whole`: a quarter of what is around it, at least 1.

    So one user alone fills nothing that others need.
    """
    yield path[:1], max(1, whole // _SHARE)
    if path[1]:
        yield path[:2], max(1, whole // _SHARE**2)


def login_name(uid: int) -> str:
    """The login name of a user id, or `uid-N` where there is none that can name a file. May take its time (LDAP)."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = ""
    return name if is_free(name) else f"uid-{uid}"


def may_name(uid: int) -> bool:
    """Root and the daemon's own user could read everybody's conversations in their files anyway."""
    return uid in (0, os.geteuid())


def named(account: str, name: str | None, *, trusted: bool) -> User:
    """The user that a client of `account` speaks for.

    Args:
        trusted: may speak for anybody; else a name divides the account.

    Raises:
        BodyError: the name is not one, or is the daemon's own.
    """
    if name is None or name == account:
        return User(account)
    if not is_free(check_name(name, "user")):
        raise BodyError(f"{name!r} is a name that the daemon gives itself.", details={"status": 403, "param": "user"})
    return User(name) if trusted else User(account, name)


def key_user(key: str) -> str:
    """The user of a key that stands without a name in its file."""
    return f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
