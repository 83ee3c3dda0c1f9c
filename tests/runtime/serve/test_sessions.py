"""Kept conversations: whole or not at all, each user's own, and never more than the limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rkruntime.errors import BodyError, HostError, NoSuchSessionError
from rkruntime.serve.sessions import SessionStore


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "sessions", 1000)


def test_each_user_has_sessions_of_his_own(store: SessionStore, tmp_path: Path) -> None:
    store.write("ann", "talk", {"system": "é\ud800"})
    store.write("bob", "talk", {"system": "other"})
    assert store.read("ann", "talk") == {"system": "é\ud800"}
    assert [item.name for item in store.list("ann")] == ["talk"]
    assert store.list("nobody") == []
    store.delete("ann", "talk")
    with pytest.raises(NoSuchSessionError):
        store.read("ann", "talk")
    with pytest.raises(NoSuchSessionError):
        store.delete("ann", "talk")
    assert store.read("bob", "talk") == {"system": "other"}
    assert (tmp_path / "sessions" / "bob").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../x", "a\0", "x" * 65, "é", "a b", "-rf", "a\n"])
def test_names_cannot_leave_the_folder(store: SessionStore, name: str) -> None:
    for user, session in (("ann", name), (name, "talk")):
        with pytest.raises(BodyError, match="cannot be the name"):
            store.write(user, session, {})
    with pytest.raises(BodyError):
        store.list(name)


def test_the_longest_unused_goes_first(store: SessionStore, tmp_path: Path) -> None:
    for number in range(5):
        store.write("ann", f"talk{number}", {"system": "x" * 200})
        path = tmp_path / "sessions" / "ann" / f"talk{number}.json"
        os.utime(path, (number, number))
    store.write("bob", "new", {"system": "x" * 200})
    assert {item.name for item in store.list("ann")} == {"talk2", "talk3", "talk4"}
    assert [item.name for item in store.list("bob")] == ["new"]
    total = sum(path.stat().st_size for path in (tmp_path / "sessions").glob("*/*"))
    assert total <= 1000


def test_one_that_is_too_large_is_refused(store: SessionStore) -> None:
    store.write("ann", "talk", {"system": "old"})
    with pytest.raises(HostError, match="all together may have 1,000"):
        store.write("ann", "talk", {"system": "x" * 2000})
    assert store.read("ann", "talk") == {"system": "old"}


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"[" * 100_000])
def test_a_damaged_file_is_as_good_as_none(store: SessionStore, tmp_path: Path, content: bytes) -> None:
    store.write("ann", "talk", {})
    (tmp_path / "sessions" / "ann" / "talk.json").write_bytes(content)
    with pytest.raises(NoSuchSessionError):
        store.read("ann", "talk")
    store.write("ann", "talk", {"system": "again"})
    assert store.read("ann", "talk") == {"system": "again"}
