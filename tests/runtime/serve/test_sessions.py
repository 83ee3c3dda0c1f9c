"""Kept conversations: whole or not at all, each user's own, and never more than the limits of the user and of all."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rkruntime.errors import BodyError, HostError, NoSuchSessionError
from rkruntime.serve.sessions import SessionStore
from rkruntime.serve.users import User
from rkruntime.text.conversation import SCHEMA

ANN, BOB = User("ann"), User("bob")
BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "sessions", 64 * BLOCK, 1000)


def names(store: SessionStore, user: User) -> list[str]:
    return [item.name for item in store.list(user)]


def test_each_user_has_sessions_of_his_own(store: SessionStore, tmp_path: Path) -> None:
    store.write(ANN, "talk", {"system": "é\ud800"})
    store.write(BOB, "talk", {"system": "other"})
    assert store.read(ANN, "talk") == {"system": "é\ud800"}
    assert names(store, ANN) == ["talk"]
    assert store.list(User("nobody")) == []
    store.delete(ANN, "talk")
    with pytest.raises(NoSuchSessionError):
        store.read(ANN, "talk")
    with pytest.raises(NoSuchSessionError):
        store.delete(ANN, "talk")
    assert store.read(BOB, "talk") == {"system": "other"}
    assert (tmp_path / "sessions" / "bob").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../x", "a\0", "x" * 65, "é", "a b", "-rf", "a\n", "a+b"])
def test_names_cannot_leave_the_folder(store: SessionStore, name: str) -> None:
    with pytest.raises(BodyError, match="cannot be the name"):
        store.write(ANN, name, {})


def test_the_longest_unused_goes_first(store: SessionStore) -> None:
    for number in range(16):
        store.write(ANN, f"talk{number}", {})
    store.write(ANN, "talk0", {"system": "used again"})
    store.write(ANN, "new", {"system": "x" * BLOCK})
    assert set(names(store, ANN)) == {"new", "talk0", *(f"talk{number}" for number in range(3, 16))}


def test_the_order_outlives_the_daemon(store: SessionStore, tmp_path: Path) -> None:
    for number in range(16):
        store.write(ANN, f"talk{number}", {})
        os.utime(tmp_path / "sessions" / "ann" / f"talk{number}.json", (99 - number, 99 - number))
    again = SessionStore(tmp_path / "sessions", 64 * BLOCK, 1000)
    again.write(ANN, "new", {})
    assert names(again, ANN)[:2] == ["new", "talk0"]
    assert "talk15" not in names(again, ANN)


@pytest.mark.parametrize(
    "greedy",
    [lambda number: ANN, lambda number: User("ann", f"name{number}")],
    ids=["one name", "many names"],
)
def test_nobody_loses_what_another_writes_over(store: SessionStore, greedy: Callable[[int], User]) -> None:
    store.write(BOB, "diary", {"system": "bob's"})
    store.write(User("ann", "bob"), "diary", {"system": "behind the same account"})
    for number in range(200):
        # Where there is no room it is refused (507).
        with suppress(BodyError):
            store.write(greedy(number), f"fill{number}", {"system": "x" * 3 * BLOCK})
    assert store.read(BOB, "diary") == {"system": "bob's"}
    assert store.read(User("ann", "bob"), "diary") == {"system": "behind the same account"}
    store.write(BOB, "more", {"system": "x" * 8 * BLOCK})


def test_names_within_an_account_have_shares_of_it(store: SessionStore) -> None:
    """Ann and Bob come in by one account, and ann cannot take all of its share."""
    ann, bob = User("pi", "ann"), User("pi", "bob")
    for number in range(50):
        store.write(ann, f"fill{number}", {})
    assert len(names(store, ann)) == 4
    store.write(bob, "diary", {"system": "x" * 2 * BLOCK})


def test_small_files_are_counted_as_what_they_take(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "sessions", 64 * BLOCK, 1000)
    for number in range(100):
        store.write(ANN, f"talk{number}", {})
    folder = tmp_path / "sessions" / "ann"
    assert len(list(folder.iterdir())) == 16
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 <= 16 * BLOCK


def test_the_number_has_a_limit_too(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "sessions", 1 << 30, 20)
    for number in range(9):
        store.write(ANN, f"talk{number}", {})
    assert names(store, ANN) == [f"talk{number}" for number in (8, 7, 6, 5, 4)]


def test_one_that_is_too_large_is_refused_and_costs_nothing(store: SessionStore) -> None:
    store.write(ANN, "talk", {"system": "old"})
    store.write(ANN, "other", {})
    with pytest.raises(BodyError, match="no room") as caught:
        store.write(ANN, "talk", {"system": "x" * 17 * BLOCK})
    assert caught.value.details["status"] == 507
    assert store.read(ANN, "talk") == {"system": "old"}
    assert set(names(store, ANN)) == {"talk", "other"}


def test_a_limit_that_was_lowered_lets_shrink(store: SessionStore, tmp_path: Path) -> None:
    store.write(ANN, "talk", {"system": "x" * 10 * BLOCK})
    small = SessionStore(tmp_path / "sessions", 16 * BLOCK, 1000)
    small.write(ANN, "talk", {"system": "x" * 5 * BLOCK})
    with pytest.raises(BodyError):
        small.write(ANN, "talk", {"system": "x" * 6 * BLOCK})


@pytest.mark.parametrize("seed", range(5))
def test_what_is_counted_is_what_is_there(store: SessionStore, tmp_path: Path, seed: int) -> None:
    """After any mix of writes, refusals and deletions, a store that looks anew allows and refuses the same."""
    chance = random.Random(seed)
    users = [ANN, BOB, *(User("pi", name) for name in ("", "ann", "bob"))]
    for _ in range(300):
        user, name = chance.choice(users), f"talk{chance.randrange(8)}"
        with suppress(BodyError, NoSuchSessionError):
            if chance.random() < 0.3:
                store.delete(user, name)
            else:
                store.write(user, name, {"system": "x" * chance.choice([0, BLOCK, 3 * BLOCK, 20 * BLOCK])})
    again = SessionStore(tmp_path / "sessions", 64 * BLOCK, 1000)
    assert (again._bytes, again._number) == (store._bytes, store._number)
    assert again._kept.keys() == store._kept.keys() == {path.name for path in (tmp_path / "sessions").iterdir()}


def test_what_was_half_written_goes_at_the_next_start(store: SessionStore, tmp_path: Path) -> None:
    store.write(ANN, "talk", {})
    left = tmp_path / "sessions" / "ann" / ".talk.json.partial-abc"
    left.write_bytes(b"{")
    assert names(SessionStore(tmp_path / "sessions", 64 * BLOCK, 1000), ANN) == ["talk"]
    assert not left.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"[" * 100_000])
def test_a_damaged_file_is_not_taken_for_none(store: SessionStore, tmp_path: Path, content: bytes) -> None:
    store.write(ANN, "talk", {})
    (tmp_path / "sessions" / "ann" / "talk.json").write_bytes(content)
    with pytest.raises(HostError, match="is damaged"):
        store.read(ANN, "talk")
    store.write(ANN, "talk", {"system": "again"})
    assert store.read(ANN, "talk") == {"system": "again"}


TURN = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def conversation(messages: Any) -> dict[str, Any]:
    return {"conversation": {"schema": SCHEMA, "system": "", "messages": messages}}


def unread(path: Path) -> tuple[int, ...]:
    """What reading a file does not change."""
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@pytest.mark.parametrize("trouble", ["cut", "no conversation", "not readable"])
def test_only_who_says_so_replaces_a_session_that_cannot_be_read(daemon: Any, trouble: str) -> None:
    assert daemon.request("PUT", "/sessions/lost", conversation(TURN))[0] == 200
    (path,) = (daemon.state / "state").rglob("lost.json")
    if trouble == "not readable":
        # Root reads whatever its mode is.
        path.unlink()
        path.symlink_to(path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if trouble == "cut" else b'{"messages": 7}')
    before = unread(path)
    for method, place, body in [
        ("GET", "", None),
        ("POST", "/messages", {"content": "Why?"}),
        ("POST", "/resume", {"id": "q"}),
        ("PUT", "", {"system": "Be kind."}),
        ("PUT", "", {"clear": True}),
    ]:
        status, _, answer = daemon.request(method, f"/sessions/lost{place}", body)
        assert (status, answer["error"]["code"]) == (503, "host"), answer
        assert unread(path) == before
    assert "lost" in [item["name"] for item in daemon.request("GET", "/sessions")[2]["sessions"]]
    replace = daemon.request("PUT", "/sessions/lost", conversation(TURN))[0]
    assert replace == 200
    assert daemon.request("GET", "/sessions/lost")[2]["messages"] == TURN
    assert daemon.request("DELETE", "/sessions/lost")[0] == 200


@pytest.mark.parametrize(
    "messages", [TURN[:1], TURN[1:], TURN[:1] + TURN, TURN + TURN[1:], TURN[::-1], [*TURN, *TURN[:1]]], ids=range(6)
)
def test_a_conversation_that_no_question_can_follow_is_refused(daemon: Any, messages: Any) -> None:
    daemon.request("PUT", "/sessions/turns", conversation(TURN))
    status, _, answer = daemon.request("PUT", "/sessions/turns", conversation(messages))
    assert (status, answer["error"]["param"]) == (400, "conversation")
    assert daemon.request("GET", "/sessions/turns")[2]["messages"] == TURN


def test_what_cannot_be_deleted_stays_in_the_list(store: SessionStore, tmp_path: Path) -> None:
    store.write(ANN, "talk", {})
    file = tmp_path / "sessions" / "ann" / "talk.json"
    file.rename(file.with_suffix(".old"))
    file.mkdir()
    with pytest.raises(HostError, match="cannot be deleted: Is a directory"):
        store.delete(ANN, "talk")
    assert names(store, ANN) == ["talk"]
    file.rmdir()
    with pytest.raises(NoSuchSessionError):
        store.delete(ANN, "talk")
    assert names(store, ANN) == []


def test_what_else_someone_puts_into_the_folder_is_left_alone(tmp_path: Path) -> None:
    user, other = ANN, tmp_path / "ann"
    SessionStore(tmp_path, 1_000_000, 10).write(user, "good", {})
    (other / "dangling.json").symlink_to("/no/such")
    (other / "circle.json").symlink_to("circle.json")
    (other / "folder.json").mkdir()
    (other / "bad name (copy).json").write_text("{}")
    (other / ".json").write_text("{}")
    (other / f"{'x' * 65}.json").write_text("{}")
    os.mkfifo(other / "fifo.json")
    store = SessionStore(tmp_path, 1_000_000, 1)
    assert [item.name for item in store.list(user)] == ["good"]
    store.write(user, "next", {})
    assert [item.name for item in store.list(user)] == ["next"]
    assert len([*other.iterdir()]) == 8
    for name, kind in (
        ("dangling", NoSuchSessionError),
        ("circle", HostError),
        ("folder", HostError),
        ("fifo", HostError),
    ):
        with pytest.raises(kind):
            store.read(user, name)


def test_a_folder_that_nobody_can_write_into(start_daemon: Callable[..., Any], small_disk: Path) -> None:
    daemon = start_daemon(f"sessions: {{folder: {small_disk}/sessions}}", port=False)
    assert daemon.request("PUT", "/sessions/talk", {"system": "x"})[0] == 200
    (user,) = (path for path in (small_disk / "sessions").iterdir() if path.is_dir())
    (user / ".talk.json.partial-1").touch()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        status, _, body = daemon.request("DELETE", "/sessions/talk")
        assert (status, body["error"]["code"]) == (503, "host")
        assert "Read-only file system" in body["error"]["message"]
        assert [item["name"] for item in daemon.request("GET", "/sessions")[2]["sessions"]] == ["talk"]
        status, _, body = daemon.request("PUT", "/sessions/talk", {"system": "y"})
        assert (status, body["error"]["code"]) == (503, "host")
        daemon.restart()
        daemon.wait_until(daemon.socket.exists)
        assert daemon.request("GET", "/sessions/talk")[2]["system"] == "x"
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert daemon.request("DELETE", "/sessions/talk")[0] == 200


def test_a_title_is_the_beginning_of_the_first_question(store: SessionStore, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": f" Why\n is {'it so ' * 99}"}, {"role": "assistant", "content": "So."}]
    titles = {
        "asked": ({"messages": turns}, f"Why is {'it so ' * 99}"[:80]),
        "broken": ({"messages": [], "broken": {"question": "Half?"}}, "Half?"),
        "empty": ({"messages": []}, ""),
        "odd": ({"messages": [[]], "broken": {"question": 5}}, ""),
        "odder": ({"messages": {"0": 1}}, ""),
    }
    for name, (data, _) in titles.items():
        store.write(ANN, name, data)
    wanted = {name: title for name, (_, title) in titles.items()}
    assert {item.name: item.title for item in store.titled(ANN)} == wanted
    # Another daemon reads them once, and gives a damaged one none.
    (tmp_path / "sessions" / "ann" / "damaged.json").write_text("{")
    again = SessionStore(tmp_path / "sessions", 64 * BLOCK, 1000)
    order = names(again, ANN)
    assert {item.name: item.title for item in again.titled(ANN)} == {**wanted, "damaged": ""}
    (tmp_path / "sessions" / "ann" / "asked.json").unlink()
    assert {item.name: item.title for item in again.titled(ANN)} == {**wanted, "damaged": ""}
    assert names(again, ANN) == order
    assert again.titled(BOB) == []
