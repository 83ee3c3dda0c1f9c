"""A board that says nonsense: a typed error, and nothing that a terminal obeys. serve/test_ssh.py has a real one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkruntime import cli
from rkruntime.chat.link import BrokenError, Link
from rkruntime.chat.remotechat import RemoteChat
from rkruntime.chat.repl import Note
from rkruntime.chat.ways import over_ssh
from rkruntime.errors import RKEdgeError, ServiceError, UsageError
from rkruntime.remote import _SSH

# A board that answers each line with the next answer of a script, and repeats the last one.
BOARD = """
import json, os, sys, time
answers, errors = json.load(open(os.environ["SCRIPT"]))
os.write(2, bytes.fromhex(errors))
for number, line in enumerate(sys.stdin):
    data = bytes.fromhex(answers[min(number, len(answers) - 1)])
    while data:
        data = data[os.write(1, data):]
"""
STATUS = {"state": "ready", "model": "m", "release": "1.2.3", "queue": {"waiting": 0}, "temperatures": {"a": 40.0}}
TALK = {"schema": "rkedge-conversation/1", "system": "", "messages": []}
HOSTILE = "\x1b[2Jgone\x1b]0;owned\x07\x9b31m\x7f\u202egnp\u2028\r\nfalse line"


def end(status: Any = 200, body: Any = None) -> dict[str, Any]:
    return {"type": "end", "status": status, "body": body}


def lines(*events: Any) -> bytes:
    return b"".join(event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n" for event in events)


HELLO, READ = lines(end(200, STATUS)), lines(end(200, TALK))
DONE = {"type": "done", "reason": "stop", "tokens": 2, "tokens_per_s": 1.5}
ANSWER = lines({"type": "begin", "notes": []}, {"type": "text", "text": "Hi"}, DONE, end())


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RemoteChat]]:
    """Connects to a board that gives these answers, one per operation."""
    program = tmp_path / "board.py"
    program.write_text(BOARD)
    opened: list[RemoteChat] = []
    monkeypatch.setenv("RKEDGE_SSH", f"{sys.executable} -I -S {program}")
    monkeypatch.setenv("SCRIPT", str(tmp_path / "script.json"))
    monkeypatch.setattr("rkruntime.chat.remotechat._RETRY_S", (0.0,))

    def connect(*answers: bytes, errors: bytes = b"") -> RemoteChat:
        (tmp_path / "script.json").write_text(json.dumps([[answer.hex() for answer in answers], errors.hex()]))
        opened.append(RemoteChat(over_ssh("board"), session="s", system="", options={}))
        return opened[-1]

    yield connect
    for chat in opened:
        chat.close()


def test_a_board_that_makes_sense(board: Callable[..., RemoteChat]) -> None:
    chat = board(b"Welcome\n42\n[1]\n" + HELLO, READ, ANSWER, HELLO)
    assert list(chat.ask("?")) == ["Hi"]
    assert chat.last is not None
    assert (chat.last.tokens, chat.last.tokens_per_s) == (2, 1.5)
    assert chat.stats()["daemon"] == "ready, 0 waiting, hottest zone 40 °C"


# What start-up files print without a line feed: a terminal's title, a greeting, half a character, half of some JSON.
PREFIXES = [b"\x1b]0;orangepi\x07", b"Welcome to {board}: ", b"\xe2\x82", b'{"a": [', b"\0\xff\xfe", b"[1] ", b"true"]


@pytest.mark.parametrize("prefix", PREFIXES, ids=repr)
def test_text_before_an_event_in_its_line(board: Callable[..., RemoteChat], prefix: bytes) -> None:
    """At the first event, and at any other: what runs in the background prints when it likes."""
    begin, text, done = ANSWER.splitlines(keepends=True)[:3]
    answer = b"".join([prefix, begin, prefix, text, prefix, done, prefix, lines(end())])
    chat = board(prefix + HELLO, prefix + READ, answer)
    assert list(chat.ask("?")) == ["Hi"]


SILENT = "import time; time.sleep(300)"
BANNER = "print('Welcome', end='', flush=True); " + SILENT
ENDLESS = "import time\nwhile True: print('Welcome', flush=True); time.sleep(0.01)"
WITH_CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'])"


@pytest.mark.parametrize(
    ("program", "login_s", "said"),
    [
        (SILENT, 0.5, "nothing came within 0.5 seconds"),
        (BANNER, 60, "sent text, but no answer within 0.3 seconds"),
        (ENDLESS, 60, "sent text, but no answer within 0.3 seconds"),
        ("import signal; signal.signal(15, signal.SIG_IGN); " + SILENT, 2, "nothing came within 2 seconds"),
        (WITH_CHILD, 60, "exited with code 0 before a daemon answered"),
    ],
    ids=["silent", "banner", "endless", "deaf", "child"],
)
def test_a_board_that_never_answers(monkeypatch: pytest.MonkeyPatch, program: str, login_s: float, said: str) -> None:
    monkeypatch.setattr("rkruntime.chat.link._LOGIN_S", login_s)
    monkeypatch.setattr("rkruntime.chat.link._GREETING_S", 0.3)
    monkeypatch.setenv("RKEDGE_SSH", shlex.join([sys.executable, "-I", "-S", "-c", program]))
    with pytest.raises(ServiceError, match=said) as caught:
        RemoteChat(over_ssh("board"), session="s", system="", options={})
    assert "by hand" in caught.value.hint


def test_what_the_board_ignores_is_said_once(board: Callable[..., RemoteChat]) -> None:
    """An older daemon does not say what it ignores; a newer one may stop ignoring it."""
    begins = [["temperature", "top_k"], ["temperature", "top_k"], [], ["top_p"]]
    answers = [lines({"type": "begin", "notes": [], "ignored": names}, DONE, end()) for names in begins]
    chat = board(HELLO, READ, *answers, ANSWER)
    notes = [[piece.text for piece in chat.ask("?") if isinstance(piece, Note)] for _ in range(5)]
    assert [len(each) for each in notes] == [1, 0, 0, 1, 0]
    assert "temperature, top_k" in notes[0][0]
    assert "the daemon's settings" in notes[0][0]
    assert "top_p" in notes[3][0]


def test_a_continued_conversation_says_so(board: Callable[..., RemoteChat]) -> None:
    again = TALK | {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]}
    assert "s continues after 2 turns" in board(HELLO, lines(end(200, again))).title
    assert "continues" not in board(HELLO, READ).title


def test_a_daemon_that_is_still_loading(board: Callable[..., RemoteChat]) -> None:
    status = STATUS | {"state": "loading", "release": None, "max_context": None}
    assert "it is still being loaded" in board(lines(end(200, status)), READ).title


@pytest.mark.parametrize(
    "wrong", [{"state": []}, {"state": {"a": 1}}, {"state": HOSTILE}, {"error": [HOSTILE]}, {"error": "x" * 5000}, {}]
)
def test_a_state_that_makes_no_sense(board: Callable[..., RemoteChat], wrong: dict[str, Any]) -> None:
    title = board(lines(end(200, STATUS | {"release": None, "state": "failed"} | wrong)), READ).title
    assert title.isprintable()
    assert len(title) < 600


def test_sessions_are_listed(board: Callable[..., RemoteChat]) -> None:
    rows = [{"name": "monday", "size": 1200, "changed": 1.7e9}, {"name": "x", "size": "much"}, 7]
    chat = board(HELLO, READ, lines(end(200, {"sessions": rows})), lines(end(200, {"sessions": None})))
    assert chat.sessions() == {"monday": "1,200 bytes"}
    assert chat.sessions() == {}


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "a b", "x" * 65, "\x1b[2J", "é", "-x"])
def test_a_name_that_no_conversation_can_have_is_refused_at_once(board: Callable[..., RemoteChat], name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a conversation") as error:
        RemoteChat(over_ssh("board"), session=name, system="", options={})
    assert "letters" in error.value.hint


@pytest.mark.parametrize("variable", ["RKEDGE_SSH", "RKEDGE_ATTACH"])
@pytest.mark.parametrize("command", ["ssh 'x", 'ssh "x', "ssh \\"])
def test_a_command_that_is_no_shell_words_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, command: str
) -> None:
    monkeypatch.setenv("RKEDGE_SSH", "false")
    monkeypatch.setenv(variable, command)
    assert cli.main(["chat", "me@board"]) == 2
    assert f"The command in {variable} cannot be read" in capsys.readouterr().err


NONSENSE = [
    b"{}\n",
    b'{"a": 1}\n',
    b'{"type": 3}\n',
    b'{"type": "end"}\n',
    b'{"type": "end", "status": "200"}\n',
    b'{"type": "end", "status": 200, "body": [1]}\n',
    b'{"type": "text"}\n',
    b'{"type": "text", "text": 3}\n',
    b'{"type": "text", "text": "\\ud800"}\n',
    b'{"type": "begin"}\n',
    b'{"type": "begin", "notes": [3]}\n',
    b'{"type": "begin", "notes": [], "ignored": "temperature"}\n',
    b'{"type": "begin", "notes": [], "ignored": [3]}\n',
    b'{"type": "begin", "notes": [], "ignored": null}\n',
    b'{"type": "begin", "notes": "text"}\n',
    b'{"type": "done", "reason": "because"}\n',
    b'{"type": "done", "reason": ["stop"]}\n',
    b'{"type": "done"}\n',
    b'{"type": "done", "reason": "stop", "tokens": "2"}\n',
    b'{"type": "done", "reason": "stop", "tokens": -1}\n',
    b'{"type": "done", "reason": "stop", "tokens": 1e999}\n',
    b'{"type": "done", "reason": "stop", "tokens_per_s": "fast"}\n',
    b'{"type": "done", "reason": "stop", "tokens_per_s": NaN}\n',
    b'{"type": "done", "reason": "stop", "tokens_per_s": ' + b"9" * 4000 + b"}\n",
    b'{"type": "text", "text": "H\n',
    b'Welcome{"type": "text", "te{"type": "text", "text": "Hi"}\n',
    b"[" * 100_000 + b"\n",
    b'{"type":' * 100_000 + b"\n",
    b"x" * (17 << 20),
]


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: answer[:40].decode())
def test_nonsense_is_a_typed_error(board: Callable[..., RemoteChat], answer: bytes) -> None:
    chat = board(HELLO, READ, answer + ANSWER, HELLO)
    with pytest.raises(ServiceError, match="The board sent"):
        list(chat.ask("?"))
    assert chat.stats()["model"]  # over a new connection: nothing is left of the old one
    with pytest.raises(ServiceError):
        board(answer)


def children() -> set[str]:
    return {one for task in Path("/proc/self/task").glob("*/children") for one in task.read_text().split()}


def test_statuses_that_are_not_what_they_should_be(board: Callable[..., RemoteChat]) -> None:
    for status in (
        {},
        {"queue": 3, "temperatures": [1]},
        {"temperatures": {"a": "hot"}},
        {"model": [1], "release": {}},
    ):
        assert board(lines(end(200, status)), READ, lines(end(200, status))).stats()["daemon"]
    before = children()
    for talk in ({}, {"system": 3}, {**TALK, "messages": 3}, {**TALK, "messages": [{"role": "x"}]}):
        with pytest.raises(ServiceError, match="not a conversation"):
            board(HELLO, lines(end(200, talk)))
    assert children() <= before  # nobody has a chat to close
    assert board(HELLO, lines(end(200, {**TALK, "system": "Be kind."}))).system == "Be kind."


def test_lines_without_end(board: Callable[..., RemoteChat], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkruntime.chat.link._MOST_LINES", 1000)
    with pytest.raises(ServiceError, match="endless lines"):
        board(b"Welcome\n" * 2000 + HELLO)


def test_nothing_of_a_board_reaches_the_terminal(
    board: Callable[..., RemoteChat], capfd: pytest.CaptureFixture[str]
) -> None:
    errors = HOSTILE.encode() + b"\nWarning: \xff\n" + b"y\n" * 100_000 + b"z" * 100_000
    status = {**STATUS, "model": HOSTILE, "state": HOSTILE}
    begin = {"type": "begin", "notes": [HOSTILE]}
    chat = board(lines(end(200, status)), READ, lines(begin, DONE, end()), lines(end(200, status)), errors=errors)
    notes = [piece.text for piece in chat.ask("?") if isinstance(piece, Note)]
    texts = [chat.title, *notes, *chat.stats().values()]
    chat.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert "gone" in err
    assert "Warning" in err
    assert len(err) < 10_000
    for text in (*texts, *err.splitlines()):
        assert not set(text) & set("\x1b\x07\x9b\x7f\u202e\u2028\r\n"), text


PART = lines({"type": "begin", "notes": []}, {"type": "text", "text": "Hi"})
BREAKS = {
    "a 200": end(),
    "a 204": end(204),
    "another's stop": end(499),
    "the daemon is gone": end(502, {"error": {"message": "It went away.", "code": "daemon_gone"}}),
    "no daemon": end(503, {"error": {"message": "None.", "code": "daemon_gone"}}),
}


@pytest.mark.parametrize("break_", BREAKS.values(), ids=BREAKS)
def test_an_answer_without_its_end_is_not_taken_for_whole(board: Callable[..., RemoteChat], break_: Any) -> None:
    """Each connection tells the script from its beginning: what answers READ answers the resume."""
    lost = lines(end(404, {"error": {"message": "No such answer."}}))
    chat = board(HELLO, READ, PART + lines(break_))
    (Path(os.environ["SCRIPT"])).write_text(json.dumps([[HELLO.hex(), lost.hex()], ""]))
    pieces = []
    with pytest.raises(ServiceError, match="interrupted, and the board has not kept it"):
        pieces.extend(chat.ask("?"))
    # The rest comes with the next connection, if the board has kept it.
    chat = board(HELLO, READ, PART + lines(break_))
    rest = lines({"type": "begin", "notes": []}, {"type": "text", "text": " there"}, DONE, end())
    (Path(os.environ["SCRIPT"])).write_text(json.dumps([[HELLO.hex(), rest.hex()], ""]))
    assert [piece for piece in chat.ask("?") if isinstance(piece, str)] == ["Hi", " there"]


def test_a_daemon_that_goes_away_for_ever(board: Callable[..., RemoteChat]) -> None:
    with pytest.raises(ServiceError, match=r"The daemon says: None\."):
        board(HELLO, lines(BREAKS["no daemon"]))


def test_an_answer_that_breaks_off_for_ever(board: Callable[..., RemoteChat]) -> None:
    chat = board(HELLO, READ, PART + lines(end()), HELLO)
    with pytest.raises(ServiceError, match=r"keeps being interrupted|keeps breaking"):
        list(chat.ask("?"))


def test_a_message_that_no_board_reads(board: Callable[..., RemoteChat], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = board(HELLO, READ, ANSWER)
    monkeypatch.setattr("rkruntime.chat.link.MAX_LINE", 1000)
    with pytest.raises(UsageError, match="MB long as JSON"):
        list(chat.ask("🙂" * 100))
    assert list(chat.ask("?")) == ["Hi"]


EVENTS = st.dictionaries(
    st.sampled_from(
        ["type", "status", "body", "text", "notes", "ignored", "tokens", "reason", "tokens_per_s", "error"]
    ),
    st.sampled_from(["begin", "text", "done", "error", "end", "stop", 200, 404, 429, 499, 500, "", None, -1, [], {}])
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=4,
    ),
)
LINES = st.lists(
    EVENTS.map(lambda event: lines(event)) | st.binary(max_size=30).map(lambda data: data + b"\n"), max_size=4
)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(answers=st.lists(LINES.map(b"".join), min_size=1, max_size=4), honest=st.integers(0, 3))
def test_random_nonsense(board: Callable[..., RemoteChat], answers: list[bytes], honest: int) -> None:
    whole = [*[HELLO, READ, ANSWER][:honest], *(answer + lines(end()) for answer in answers)]
    with suppress(RKEdgeError):
        chat = board(*whole)
        list(chat.ask("?"))
        chat.stats()


# A board whose first connection breaks off within an answer, and whose next ones take their time to greet.
SLOW = """
import json, os, sys, time
folder, wait, greeting, *answers = sys.argv[1:]
again = os.path.exists(folder + "/again")
open(folder + "/again", "w").close()
for line in sys.stdin:
    operation = json.loads(line)["op"]
    if operation == "stop":
        print(json.dumps({"type": "end", "status": 499, "body": {}}), flush=True)
    if again and operation == "hello":
        open(folder + "/greeting", "w").close()
        time.sleep(float(wait))
    if operation == "ask":
        number = json.loads(line)["body"]["id"]
        open(folder + "/number", "w").write(number)
        print(json.dumps({"type": "text", "text": "be"}), flush=True)
        break
    body = json.loads(greeting)
    if operation == "read" and again:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "begun"}]
        body = {**body, "messages": messages, "number": open(folder + "/number").read(), "broken": True}
    print(json.dumps({"type": "end", "status": 200, "body": body}), flush=True)
"""


@pytest.mark.parametrize(("wait", "stops", "rest"), [(300, 2, None), (300, 1, None), (0.3, 1, "gun")])
def test_a_stop_while_the_connection_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: float, stops: int, rest: str | None
) -> None:
    """An ssh that hangs is ended, at the second Ctrl-C at once; one that answers tells what the board has kept."""
    (tmp_path / "board.py").write_text(SLOW)
    words = [
        sys.executable,
        "-I",
        "-S",
        str(tmp_path / "board.py"),
        str(tmp_path),
        str(wait),
        json.dumps(STATUS | TALK),
    ]
    monkeypatch.setenv("RKEDGE_SSH", shlex.join(words))
    monkeypatch.setattr("rkruntime.chat.remotechat._RETRY_S", (0.0,))
    monkeypatch.setattr("rkruntime.chat.remotechat._PATIENCE_S", 1.0 if stops == 1 else 250.0)
    chat = RemoteChat(over_ssh("board"), session="s", system="", options={})

    def stop() -> None:
        while not (tmp_path / "greeting").exists():
            time.sleep(0.01)
        for _ in range(stops):
            chat.stop()

    person = threading.Thread(target=stop, daemon=True)
    said = []
    for piece in chat.ask("?"):
        said.append(piece)
        if isinstance(piece, Note) and person.ident is None:
            person.start()
    broken = Note("\nThe connection broke; reconnecting ...")
    silent = Note("\nThe board did not report what it has kept of this answer.")
    assert said == ["be", broken, rest or silent]
    chat.close()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no OpenSSH here")
def test_an_ssh_that_connects_to_nothing_is_given_up() -> None:
    """By itself ssh waits as long as TCP does, which is minutes."""
    done = subprocess.run([*_SSH[:1], "-G", *_SSH[1:], "board"], capture_output=True, text=True, check=True)
    facts = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert 0 < int(facts["connecttimeout"]) <= 30


def test_a_board_that_freezes_behind_its_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sshd answers for a board whose `rkedge attach` does nothing more; only that itself can say that it is there."""
    monkeypatch.setattr("rkruntime.chat.link._FROZEN_S", 1.0)
    alive = '{"type": "alive"}'
    script = tmp_path / "board.sh"
    script.write_text(
        f"read line; echo '{alive}'; echo '{json.dumps(end(200, STATUS))}'\n"
        # As long as it says so, it may take its time.
        f"read line; for i in 1 2 3 4 5 6; do echo '{alive}'; sleep 0.3; done; echo '{json.dumps(end(200, TALK))}'\n"
        f"read line; echo '{alive}'; exec sleep 1000\n"
    )
    link = Link(["sh", str(script)])
    try:
        for expected in (STATUS, TALK):
            link.send({"op": "x"})
            assert [event["body"] for event in link.events()] == [expected]
        link.send({"op": "x"})
        with pytest.raises(BrokenError) as broken:
            list(link.events())
        assert "has sent nothing for 1 second" in str(broken.value.told)
    finally:
        link.close()
