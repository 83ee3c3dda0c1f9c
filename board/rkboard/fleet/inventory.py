"""The file that names boards: groups of them, each with its ssh destination, bundle and options."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, TypeAlias

from rkruntime.errors import UsageError
from rkruntime.schema import Length, build
from rkruntime.words import NAME, NAME_RULE
from rkruntime.yamltext import read_mapping

MOST_BOARDS: Final = 256
_HINT: Final = "docs/fleet.md has an example."
_ADDRESS: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:]{2,45}\]):(\d{1,5})", re.ASCII)
_SCHEME: Final = "http://"
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)

Fail: TypeAlias = Callable[[str], UsageError]
_Text = Annotated[str, Length(256, least=1)]
_Path = Annotated[str, Length(4096, least=1)]


@dataclass(frozen=True)
class _Options:
    """Options that may stand at each level: for all boards, a group or a board. The innermost one counts.

    Attributes:
        bundle: A bundle's folder, relative to the folder of the inventory.
        library: A librkllmrt.so, relative to the same folder.
        test: Whether a bundle is tried out once it is there.
    """

    bundle: _Path | None = None
    library: _Path | None = None
    test: bool | None = None


@dataclass(frozen=True)
class _BoardText(_Options):
    """A board.

    Attributes:
        ssh: A destination of ssh, such as `root@10.0.0.11`.
        url: Where a proxy reaches the API of its daemon, such as `http://10.0.0.11:8080`.
        key: The environment variable of the proxy that holds the API key for the board.
    """

    ssh: _Text = ""
    url: _Text | None = None
    key: _Text | None = None


@dataclass(frozen=True)
class _GroupText(_Options):
    boards: dict[str, _BoardText] = field(default_factory=dict)


@dataclass(frozen=True)
class _InventoryText(_Options):
    groups: dict[str, _GroupText] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A board of an inventory. `host` and `port` are those of its `url`, or empty and 0 without one."""

    name: str
    group: str
    destination: str
    bundle: Path | None
    library: Path | None
    test: bool
    host: str
    port: int
    key: str

    @property
    def address(self) -> str:
        """The host and port of its daemon's API."""
        return f"{self.host}:{self.port}"


def read_inventory(path: Path) -> list[Entry]:
    """Return the boards of an inventory, in its order.

    Raises:
        UsageError: It cannot be read, or has an entry that is not allowed, which the message names.
    """

    def fail(what: str) -> UsageError:
        return UsageError(f"{path}: {what}.", hint=_HINT)

    text = build(_InventoryText, read_mapping(path, fail), fail)
    found = list(_entries(text, path.parent, fail))
    if not found:
        raise fail("it names no board")
    if len(found) > MOST_BOARDS:
        raise fail(f"it names {len(found)} boards; it may name {MOST_BOARDS}")
    for what, values, same in (
        ("name", [one.name for one in found], str),
        ("ssh", [one.destination for one in found], _one_destination),
        ("url", [one.address for one in found if one.host], str.lower),
    ):
        known: dict[str, str] = {}
        for value in values:
            if (first := known.get(same(value))) is not None:
                raise fail(f"two boards have the {what} {value}" + (f", once as {first}" if first != value else ""))
            known[same(value)] = value
    return found


def _one_destination(destination: str) -> str:
    """Return a destination of ssh with its host in lower case: hosts are the same in any case, users are not."""
    user, at, host = destination.rpartition("@")
    return f"{user}{at}{host.lower()}"


def _entries(text: _InventoryText, folder: Path, fail: Fail) -> Iterator[Entry]:
    for group, members in text.groups.items():
        if not NAME.fullmatch(group):
            raise fail(f"{group[:80]!r} is not a name for a group: it may have {NAME_RULE}")
        for name, board in members.boards.items():
            where = f"groups.{group}.boards.{name[:80]}"
            if not NAME.fullmatch(name):
                raise fail(f"{name[:80]!r} is not a name for a board: it may have {NAME_RULE}")
            if not board.ssh or not board.ssh.isprintable() or board.ssh.startswith("-"):
                raise fail(f"{where}.ssh is not a destination of ssh, such as root@10.0.0.11")
            if board.key is not None and not _VARIABLE.fullmatch(board.key):
                raise fail(f"{where}.key is not the name of an environment variable, such as RKEDGE_KEY_DESK")
            levels = (board, members, text)
            host, port = _address(board.url, where, fail)
            tests = [level.test for level in levels if level.test is not None]
            yield Entry(
                name, group, board.ssh, _place(folder, [level.bundle for level in levels]),
                _place(folder, [level.library for level in levels]), tests[0] if tests else True,
                host, port, board.key or "",
            )  # fmt: skip


def _place(folder: Path, values: Sequence[str | None]) -> Path | None:
    nearest = next((value for value in values if value is not None), None)
    return None if nearest is None else folder / Path(nearest).expanduser()


def _address(url: str | None, where: str, fail: Fail) -> tuple[str, int]:
    """Return the host and port of a URL that is nothing but an address: they go into other programs' configuration."""
    if url is None:
        return "", 0
    found = address(url.removeprefix(_SCHEME).removesuffix("/")) if url.startswith(_SCHEME) else None
    if found is None:
        raise fail(f"{where}.url is not a plain address, such as http://10.0.0.11:8080")
    return found


def address(text: str) -> tuple[str, int] | None:
    """Return the host and port of `HOST:PORT`; None if the text is anything else."""
    found = _ADDRESS.fullmatch(text)
    return (found[1], int(found[2])) if found and 0 < int(found[2]) < 1 << 16 else None


def chosen(found: Sequence[Entry], groups: Sequence[str], names: Sequence[str]) -> list[Entry]:
    """Return the boards of these groups and with these names; all boards if neither is given.

    Raises:
        UsageError: There is no such group or board.
    """
    for kind, wanted, known in (
        ("group", groups, {one.group for one in found}),
        ("board", names, {one.name for one in found}),
    ):
        for name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name[:80], known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(sorted(known)[:20])}."
                raise UsageError(f"The inventory has no {kind} {name[:80]!r}.", hint=hint)
    return [one for one in found if not (groups or names) or one.group in groups or one.name in names]
