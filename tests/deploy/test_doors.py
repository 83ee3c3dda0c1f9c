"""What a hostile or unlucky board, bundle or neighbour can do to a deployment, and what puts it right."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rkboard.commands import deploy as command
from rkboard.deploy import session as sessions
from rkboard.deploy import trial, work
from rkboard.deploy.session import Session
from rkboard.deploy.there import program as programs
from rkboard.deploy.there import service as services
from rkboard.deploy.there.ground import Ground, Refused, others_may_change
from rkboard.deploy.work import Done
from rkruntime import cli, remote
from rkruntime.errors import ServiceError

from .conftest import wait_until
from .test_deploy import FIRST, QA, Put, deploy, session
from .tree import Tree

__all__ = ["deploy", "session"]

Open = Callable[[], Session]
EVIL = {"key": "x", "kind": "file", "path": "/etc/evil", "content": "eA=="}


def damage(path: Path) -> None:
    """Change a byte, and nothing that `ls` shows."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def model_of(tree: Tree, name: str) -> Path:
    return next((tree.home / "bundles").glob(f"{name}-*")) / "model.rkemu"


def restart(tree: Tree) -> None:
    tree.service._ground.run("systemctl", "restart", "rkedge.service")
    wait_until(lambda: (tree.service.status() or {}).get("state") in ("ready", "failed"))


# A bundle's bytes


def test_a_file_that_is_not_taken_is_no_request(tree: Tree, session: Open) -> None:
    """A disk that is full, for one: the rest of the file is on its way, and it may look like requests."""
    with session() as there:
        there.call("lock", make=True)
        with pytest.raises(ServiceError, match="bytes of"):
            there.call("receive", digest="0" * 64, size=1000, offset=5)
        with pytest.raises(ServiceError):
            there.call("change", step=EVIL)
    assert not (tree.root / "etc/evil").exists()


@pytest.mark.parametrize("line", [b"\n", b"\xff\xfe\n", b"[1]\n", b"[" * 100_000 + b"\n", b'{"op": 3}\n'])
def test_a_request_that_is_none(line: bytes, session: Open) -> None:
    with session() as there:
        there._remote.send(line)
        with pytest.raises(ServiceError, match=r"cannot read|no such operation|There is no"):
            there._answer()


def test_a_board_that_takes_no_more_says_why(
    session: Open, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(8 << 20))
    with session() as there:
        there.call("lock", make=True)
        blob = tree.home / "incoming" / ("0" * 64)
        monkeypatch.setattr(there, "call", lambda *_, **__: {"held": {"0" * 64: 0}})
        blob.parent.mkdir()
        blob.write_bytes(b"one")  # less is there than was said
        with pytest.raises(ServiceError, match="bytes of"):
            there.send({"0" * 64: (8 << 20, large)}, lambda *_: None)


# What others made or may change


def test_what_was_made_by_hand_is_left_alone(tree: Tree, session: Open) -> None:
    (tree.home / "bundles/mine").mkdir(parents=True)
    (tree.home / "bundles/mine/model.rkllm").write_text("precious")
    (tree.home / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (tree.root / "var/lib/rkedge").mkdir()
    before = sorted(tree.root.rglob("*"))
    for make in (False, True):
        with session() as there, pytest.raises(ServiceError, match="by hand"):
            there.call("lock", make=make)
    assert sorted(tree.root.rglob("*")) == before


def test_nothing_is_made_where_nothing_was_deployed(tree: Tree, session: Open) -> None:
    with session() as there:
        assert there.call("look", places=[])["deployed"] is False
        with pytest.raises(ServiceError, match="Nothing was deployed"):
            there.call("lock")
    assert not tree.home.exists()


@pytest.mark.parametrize("which", [".", "bundles", "programs/x"])
@pytest.mark.parametrize("how", ["writable", "another's"])
def test_what_others_may_change_is_not_trusted(which: str, how: str, tree: Tree, session: Open) -> None:
    place = tree.home / which
    place.mkdir(parents=True)
    if how == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(place, 12345, 12345)
    else:
        if which != ".":
            pytest.skip("within a folder that is root's alone, nobody gets there")
        place.chmod(0o777)
    for request in ({"op": "look", "places": []}, {"op": "lock", "make": True}):
        with session() as there, pytest.raises(ServiceError, match="Somebody else than root may change"):
            there.call(**request)


def test_a_python_that_others_may_change_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3.13").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (folder / "python3.13").chmod(0o755)
    monkeypatch.setattr(programs, "_PLACES", (str(folder),))
    folder.chmod(0o777)
    assert programs.interpreter() == ("", "")
    assert not (tmp_path / "started").exists()


def test_a_link_on_the_way_that_others_may_change_is_not_trusted(tmp_path: Path) -> None:
    """Where it leads at the moment is root's, but who may change the link may lead it elsewhere later."""
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/python3").touch()
    (tmp_path / "open/link").symlink_to(tmp_path / "closed/python3")
    (tmp_path / "python3").symlink_to("open/link")
    (tmp_path / "other").symlink_to("closed/python3")
    (tmp_path / "open").chmod(0o777)
    assert others_may_change(tmp_path / "python3", tmp_path)
    assert not others_may_change(tmp_path / "other", tmp_path)
    (tmp_path / "open").chmod(0o755)
    assert not others_may_change(tmp_path / "python3", tmp_path)
    (tmp_path / "turn").symlink_to("turn")
    assert not others_may_change(tmp_path / "turn", tmp_path)


def test_a_lock_that_was_removed_locks_nobody_out(tree: Tree, destination: str) -> None:
    """undeploy removes its own lock while others wait for it."""
    said: list[str] = []
    first, second, third = (Session(destination, said.append, str(tree.root)) for _ in range(3))
    with first, second, third:
        first.call("lock", make=True)
        waiting = threading.Thread(target=lambda: second.call("lock", make=True))
        waiting.start()
        wait_until(lambda: len(said) == 1)
        first.call("undo", purge=False)
        first._remote.end(5)
        waiting.join(30)
        late = threading.Thread(target=lambda: third.call("lock", make=True))
        late.start()
        wait_until(lambda: len(said) == 2)
        assert late.is_alive()
        second._remote.end(5)
        late.join(30)
        assert not late.is_alive()


# Damage


def test_a_damaged_file_is_sent_again(tree: Tree, deploy: Put, bundles: dict[str, Path]) -> None:
    deploy(bundles["base"])
    damage(model_of(tree, "base"))
    restart(tree)
    assert tree.ask(FIRST) is None
    done, _ = deploy(bundles["base"])
    assert [planned.title for planned in done.changed] == ["bundle", "service"]
    assert tree.ask(FIRST) == QA[FIRST]


@pytest.mark.long
def test_a_damaged_program_is_installed_again(tree: Tree, deploy: Put, bundles: dict[str, Path]) -> None:
    deploy(bundles["base"])
    damage(next((tree.home / "programs").rglob("rkruntime/cli.py")))
    tree.service._ground.run("systemctl", "disable", "rkedge.service")
    done, _ = deploy(bundles["base"])
    assert "program" in [planned.title for planned in done.changed]
    assert tree.ask(FIRST) == QA[FIRST]


@pytest.mark.long
def test_another_bundle_replaces_one_that_has_failed(tree: Tree, deploy: Put, bundles: dict[str, Path]) -> None:
    """What the daemon says of the old one is not said of the new one."""
    deploy(bundles["base"])
    damage(model_of(tree, "base"))
    restart(tree)
    deploy(bundles["pirate"])
    assert (tree.ask(FIRST) or "").startswith("Arr")


@pytest.mark.long
def test_a_switch_that_can_neither_be_completed_nor_undone(
    tree: Tree, deploy: Put, bundles: dict[str, Path], session: Open
) -> None:
    for name in ("base", "pirate"):
        deploy(bundles[name])
    damage(model_of(tree, "base"))
    damage(model_of(tree, "pirate"))
    state = json.loads((tree.home / "deploy.json").read_text())
    (tree.home / "deploy.json").write_text(json.dumps({**state, "pending": {"to": "1", "from": "2"}}))
    deploy(bundles["base"])
    assert tree.ask(FIRST) == QA[FIRST]


@pytest.mark.long
def test_a_reload_that_is_refused_says_why(tree: Tree, deploy: Put, bundles: dict[str, Path], session: Open) -> None:
    for name in ("base", "pirate"):
        deploy(bundles[name])
    damage(model_of(tree, "base"))
    with session() as there:
        there.call("lock")
        with pytest.raises(ServiceError, match=r"refused it: .*SHA-256"):
            there.call("switch", parts=None)
    assert (tree.ask(FIRST) or "").startswith("Arr")


@pytest.mark.parametrize(
    "text",
    [b"", b"\0" * 500, b"[]", b'{"steps": [1]}', b'{"pending": 5}', b'{"steps": {"a": 1}}', b"[" * 100_000, b"\xff"],
)
def test_a_record_that_is_none(text: bytes, tree: Tree, session: Open) -> None:
    tree.home.mkdir()
    (tree.home / "deploy.json").write_bytes(text)
    with session() as there:
        assert there.call("look", places=[])["pending"] is False
        there.call("lock")
    assert (tree.home / "deploy.json.damaged").read_bytes() == text


@pytest.mark.long
def test_a_damaged_record_of_what_was_changed(tree: Tree, deploy: Put, bundles: dict[str, Path], session: Open) -> None:
    unit = tree.root / "etc/systemd/system/rkedge.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    before = tree.outside()
    deploy(bundles["base"])
    (tree.home / "deploy.json").write_bytes(b"")
    with session() as there:
        assert there.call("look", places=[])["status"]["state"] == "ready"
        there.call("lock")
        with pytest.raises(ServiceError, match="not known any more"):
            there.call("undo", purge=False)
    assert tree.ask(FIRST) == QA[FIRST]
    deploy(bundles["base"])
    with session() as there:
        there.call("lock")
        left = there.call("undo", purge=True)["left"]
    assert left == []
    assert not tree.home.exists()
    after = tree.outside()
    after.pop("etc/rkedge", None)
    after.pop("etc/rkedge/daemon.yaml", None)  # it may be somebody's own by now
    assert after == before


@pytest.mark.long
def test_one_thing_that_cannot_be_undone_keeps_none_of_the_others(
    tree: Tree, deploy: Put, bundles: dict[str, Path], session: Open
) -> None:
    deploy(bundles["base"])
    state = json.loads((tree.home / "deploy.json").read_text())
    state["steps"]["/x"] = {"kind": "file", "path": "/etc/hostname/x", "sha256": "", "after": "no such"}
    state["steps"]["/y"] = {"kind": "no such"}
    (tree.home / "deploy.json").write_text(json.dumps(state))
    with session() as there:
        there.call("lock")
        left = there.call("undo", purge=True)["left"]
    assert len(left) == 2
    assert not tree.home.exists()
    assert not (tree.root / "etc/systemd/system/rkedge.service").exists()


PI = "rkedge:x:1000:1000:somebody:/home/rkedge:/bin/bash\n"


@pytest.fixture
def undone(tree: Tree, session: Open) -> Callable[[str], list[str]]:
    """What `undeploy --purge` leaves on a board with these accounts; its `userdel` says that it was called."""
    userdel = tree.root / "usr/bin/userdel"
    userdel.write_text(f'#!/bin/sh\necho "$@" > {tree.root}/run/userdel\n')
    userdel.chmod(0o755)

    def undone(accounts: str) -> list[str]:
        (tree.root / "etc/passwd").write_text(accounts)
        with session() as there:
            there.call("lock", make=True)
            left: list[str] = there.call("undo", purge=True)["left"]
            return left

    return undone


def test_a_person_who_has_the_daemons_name_stays(tree: Tree, undone: Callable[[str], list[str]]) -> None:
    assert undone(f"root:x:0:0:root:/root:/bin/bash\n{PI}") == ["the user rkedge is not the daemon's own, and stays"]
    assert not (tree.root / "run/userdel").exists()


def test_the_daemons_user_does_not_stay(tree: Tree, undone: Callable[[str], list[str]]) -> None:
    """The line as systemd-sysusers writes it."""
    assert undone("rkedge:x:996:996:RKEdge chat daemon:/var/lib/rkedge:/usr/sbin/nologin\n") == []
    assert (tree.root / "run/userdel").read_text() == "rkedge\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone mounts")
def test_conversations_on_a_disk_of_their_own_are_removed(tree: Tree, undone: Callable[[str], list[str]]) -> None:
    place = tree.root / "var/lib/rkedge"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=False)
    if mount.returncode:
        pytest.skip("nothing may be mounted here")
    try:
        (place / "sessions").mkdir()
        (place / "sessions/secret.json").write_text("{}")
        assert undone("") == [f"{place} could not be removed, but is empty now"]
        assert list(place.iterdir()) == []
        assert not tree.home.exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


class _Daemon(services.Service):
    """One that answers with these."""

    def __init__(self, tree: Tree, *answers: Any) -> None:
        super().__init__(Ground(str(tree.root)))
        self.answers = list(answers)

    def ask(self, path: str, body: Any = None, patience: float = 10) -> Any:
        assert body["keep_alive"] == 0
        return self.answers.pop(0)


BUSY = (429, {}, {"error": "The NPU was busy for 120 seconds, which is the limit."})


def test_a_self_test_waits_for_the_answers_before_it(tree: Tree) -> None:
    daemon = _Daemon(tree, BUSY, BUSY, (200, {}, {"done": True}))
    daemon._unload()
    assert daemon.answers == []
    _Daemon(tree, None)._unload()  # nobody answers, so nothing is loaded


@pytest.mark.parametrize("answer", [(503, {}, {"error": "busy"}), (400, {}, ["busy"]), BUSY])
def test_a_model_that_stays_loaded_is_not_tested_beside(
    answer: Any, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_LOAD_S", -1)
    with pytest.raises(Refused, match="does not unload"):
        _Daemon(tree, answer)._unload()


# Tools and a daemon that flood, drip or never end


def test_the_end_of_what_a_tool_prints(tree: Tree) -> None:
    tool = tree.root / "usr/bin/flood"
    tool.write_text(f"#!{sys.executable}\nprint('y' * 50_000_000)\nprint('the end')\n")
    tool.chmod(0o755)
    said = Ground(str(tree.root)).run("flood") or ""
    assert said.endswith("the end")
    assert len(said) < 8 << 20
    with pytest.raises(Refused, match="did not end"):
        tool.write_text("#!/bin/sh\nwhile :; do echo y; done\n")
        Ground(str(tree.root)).run("flood", limit=0.5)


@contextmanager
def answering(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()

        def serve() -> None:
            link, _ = door.accept()
            with link:
                link.recv(4096)
                with suppress(OSError):
                    answer(link)

        threading.Thread(target=serve, daemon=True).start()
        yield


def drip(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        link.sendall(b" ")
        threading.Event().wait(0.05)


def deep(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"[" * 200_000)


def saying(text: str) -> Callable[[socket.socket], None]:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n"
    return lambda link: link.sendall((head + text).encode())


# What Python's json takes and writes, and the person's end would not read: nothing could be done any more.
NOT_TO_BE_PASSED_ON = ['{"x": NaN}', '{"x": -Infinity}', '{"x": 1e999}', '{"x": %s}' % ("9" * 5000), '{"x": %s}' % (
    "[" * 900 + "]" * 900), "[" + "[]," * 30_000 + "0]"]  # fmt: skip


@pytest.mark.parametrize("answer", [drip, deep, *map(saying, NOT_TO_BE_PASSED_ON)])
def test_a_daemon_that_plays(
    answer: Callable[[socket.socket], None], tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_LATE_S", 0.1)
    with answering(tree.root / services.SOCKET.lstrip("/"), answer):
        assert tree.service.ask("/status", patience=0.5) is None


def test_a_daemon_that_says_much(tree: Tree) -> None:
    """Within what an answer may be: a person's end takes it."""
    text = json.dumps({"model": "\x00" * 20_000, "more": [[at, -1.5e300] for at in range(400)]})
    with answering(tree.root / services.SOCKET.lstrip("/"), saying(text)):
        status = tree.service.ask("/status")
    assert status is not None
    line = sessions.MARK + json.dumps({"event": "done", "status": status[2]}).encode()
    assert sessions._event(line, "u@b")["status"] == json.loads(text)


# The person's end


@pytest.mark.parametrize("command", [["status"], ["logs"], ["rollback", "--yes"], ["undeploy", "--yes"]])
def test_an_answer_that_would_take_all_memory(
    command: list[str], fake: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    parsed: list[int] = []
    monkeypatch.setattr(sessions.json, "loads", lambda text, **_: parsed.append(len(text)))
    (tmp_path / "answer").write_bytes(sessions.MARK + b'{"event": "done", "x": [0' + b",[]" * 2_000_000 + b"]}\n")
    fake(f"cat {tmp_path}/answer; exec cat > /dev/null")
    assert cli.main([command[0], "u@b", *command[1:]]) == 8
    assert "not an answer" in capsys.readouterr().err
    assert all(size <= 1 << 20 for size in parsed)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the place of ssh."""

    def make(script: str) -> None:
        path = tmp_path / "fake-ssh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("RKEDGE_SSH", str(path))

    return make


SAYS = "while read -r request; do printf 'RKEDGE-DEPLOY %s\\n' '{}'; done"


@pytest.mark.parametrize("options", [[], ["--purge"], ["--bundle", "b-1"]])
@pytest.mark.parametrize(
    "answer",
    [
        '{"event": "done"}', '{"event": "done", "deployed": true, "parts": {"bundles": {"b-1": {}}}}',
        '{"event": "done", "deployed": 1, "active": true, "left": ["x"]}',
    ],
)  # fmt: skip
def test_a_board_that_only_says_that_all_is_removed(
    answer: str, options: list[str], fake: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(SAYS.format(answer))
    assert cli.main(["undeploy", "u@b", "--yes", *options]) == 8
    out, err = capsys.readouterr()
    assert "looking once more does not show it" in err
    assert "Removed" not in out


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ('{"event": "done", "parts": {"bundles": {"b-2": {}}}}', ["--bundle", "b-1"]),
        ('{"event": "done", "deployed": true, "left": ["/opt/rkedge has x, and stays"]}', []),
    ],
)
def test_a_board_that_shows_that_it_is_removed(
    answer: str, options: list[str], fake: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(SAYS.format(answer))
    assert cli.main(["undeploy", "u@b", "--yes", *options]) == 0
    assert "Removed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", ["exec sleep 1000", 'while :; do printf \'RKEDGE-DEPLOY {"event": "says"}\\n\'; sleep 0.1; done']
)
def test_a_board_that_never_answers(
    script: str, fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sessions, "_SOON_S", 0.5)
    monkeypatch.setattr(sessions, "_LAST_S", 0.5)
    monkeypatch.setattr(remote, "_STALLED_S", 0.5)
    fake(script)
    assert cli.main(["status", "u@b"]) == 8
    assert "u@b does not answer any more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # sudo 1.9: plugins/sudoers/auth/sudo_auth.c, check.c, log_client; sudo-rs 0.2
        ("sudo: a password is required", "asks for a password, or refuses"),
        ("sudo: Ein Passwort ist notwendig", "asks for a password, or refuses"),
        ("sudo: interactive authentication is required", "asks for a password, or refuses"),
        ("Sorry, user guest may not run sudo on board.", "asks for a password, or refuses"),
        # dash, bash, busybox
        ("sh: 1: sudo: not found", "has no sudo"),
        ("bash: line 1: python3: command not found", "has no python3"),
        ("sudo: python3: command not found", "has no python3"),
        ("sudo: [Errno 2] No such file or directory: 'sudo'", "has no sudo"),
        ("sudo: unable to resolve host orangepi5: Name or service not known", "ended with 1"),
    ],
)
@pytest.mark.parametrize("verb", ["status", "doctor"])
def test_what_stands_in_the_way_is_named(
    verb: str, said: str, expected: str, fake: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(f'echo "{said}" >&2; exit 1')
    assert cli.main([verb, "u@b"]) == 8
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verdict", "problems", "status", "expected"),
    [
        ("same", (), {"state": "ready"}, 0),
        ("same", (), "x", 0),
        ("", (), ["x"], 0),
        ("garbage", ("nonsense",), None, 7),
        ("", ("the library could not be loaded",), {}, 7),
        ("undecided", ("nothing could be seen",), {}, 9),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_the_exit_status_is_that_of_the_self_test(
    verdict: str, problems: tuple[str, ...], status: Any, expected: int, extra: list[str], bundles: dict[str, Path],
    fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake("cat > /dev/null")
    monkeypatch.setattr(work, "deploy", lambda *_: Done([], {"status": status}))
    monkeypatch.setattr(trial, "try_out", lambda *_: trial.Trial(verdict, problems, 5.0, 9))
    monkeypatch.setattr(command, "_word", lambda _: "fine")
    assert cli.main(["deploy", str(bundles["base"]), "u@b", "--yes", *extra]) == expected
    said = capsys.readouterr()
    assert ("rkedge rollback u@b" in said.err) == (expected != 0 and not extra)


@pytest.mark.parametrize("result", ["garbage", None, [], {}, {"verdict": 3}])
def test_a_self_test_that_says_nothing_is_none_that_was_passed(result: Any, bundles: dict[str, Path]) -> None:
    from rkruntime.bundle.manifest import open_bundle

    class Board:
        destination = "u@b"

        def call(self, op: str, **_: Any) -> dict[str, Any]:
            answer = {"message": {"content": "1"}, "eval_count": 1}
            return {"result": result} if op == "selftest" else {"status": 200, "answer": answer}

    found = trial.try_out(Board(), open_bundle(bundles["base"]))  # type: ignore[arg-type]
    assert found.problems


def test_a_rollback_that_is_another_one_by_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Board:
        def __init__(self, *_: Any) -> None:
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

        def call(self, op: str, **_: Any) -> dict[str, Any]:
            asked.append(op)
            before = "old" if asked.count("look") == 1 else "older"
            return {"previous": {"bundles": before}, "current": {"bundles": "new"}}

    monkeypatch.setattr(sessions, "Session", Board)
    monkeypatch.setattr("rkboard.commands.rollback.confirmed", lambda _: True)
    assert cli.main(["rollback", "u@b"]) == 8
    assert "has changed since" in capsys.readouterr().err
    assert "switch" not in asked


def test_a_board_that_does_not_read_what_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_STALLED_S", 0.3)
    sleeping = remote.Remote(["sleep", "1000"], b"mark", 1000)
    assert sleeping.send(bytes(10 << 20)) is False
    assert sleeping.end(0) is None
