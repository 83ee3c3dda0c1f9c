"""Answers that were broken off: continued where they were, or left as they are."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import SLOW
from .streams import FIRST, QA, begin_stream, text_of


def test_a_broken_answer_goes_on_where_it_was(slow: Any) -> None:
    body = {"content": FIRST, "id": "q1", "temperature": 0}
    one, seen = begin_stream(slow, "/sessions/r/messages", body, b'{"type":"text"')
    one.close()
    received = sum(len(json.loads(line)["text"]) for line in seen.splitlines() if line.startswith(b'{"type":"text"'))
    slow.wait_until(lambda: "broken" in slow.request("GET", "/sessions/r")[2])
    events = slow.lines("/sessions/r/resume", {"id": "q1", "received": received})
    assert QA[FIRST][:received] + text_of(events) == QA[FIRST]
    # The broken part was not computed again: it was on the NPU still.
    assert events[-1]["reused_tokens"] >= events[-1]["prompt_tokens"] - 2
    kept = slow.request("GET", "/sessions/r")[2]
    assert [item["content"] for item in kept["messages"]] == [FIRST, QA[FIRST]]
    # A finished answer's tail can be had again, another answer's not.
    assert text_of(slow.lines("/sessions/r/resume", {"id": "q1", "received": 10})) == QA[FIRST][10:]
    assert slow.request("POST", "/sessions/r/resume", {"id": "q2"})[0] == 404


def test_an_answer_broken_off_before_its_first_token_is_not_the_one_before(slow: Any) -> None:
    slow.lines("/sessions/n/messages", {"content": FIRST, "id": "q1", "temperature": 0})
    (path,) = (slow.state / "state").rglob("n.json")
    data = json.loads(path.read_bytes())
    path.write_text(json.dumps({**{key: data[key] for key in data if key != "reason"}, "number": "q2"}))
    assert slow.request("POST", "/sessions/n/resume", {"id": "q2"})[0] == 404


def break_off(daemon: Any, name: str, **options: Any) -> Path:
    """The file of a session whose answer was broken off after its first text."""
    body = {"content": FIRST, "id": "q", "temperature": 0, **options}
    one, _ = begin_stream(daemon, f"/sessions/{name}/messages", body, b'{"type":"text"')
    one.close()
    daemon.wait_until(lambda: "broken" in daemon.request("GET", f"/sessions/{name}")[2])
    (path,) = (daemon.state / "state").rglob(f"{name}.json")
    return path


def reload(daemon: Any) -> None:
    before = daemon.log.count("settings read again")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: daemon.log.count("settings read again") > before)


def change_broken(path: Path, **values: Any) -> None:
    data = json.loads(path.read_bytes())
    data["broken"] |= values
    path.write_text(json.dumps(data))


def test_figures_of_an_answer_that_went_on(slow: Any) -> None:
    whole = slow.lines("/sessions/u/messages", {"content": FIRST, "temperature": 0})[-1]
    break_off(slow, "v")
    before = slow.metric("rkedge_generated_tokens_total"), slow.metric("rkedge_prompt_tokens_total")
    resumed = slow.lines("/sessions/v/resume", {"id": "q"})[-1]
    assert [resumed[name] for name in ("prompt_tokens", "tokens")] == [
        whole[name] for name in ("prompt_tokens", "tokens")
    ]
    assert resumed["reused_tokens"] <= resumed["prompt_tokens"]
    assert 0 < slow.metric("rkedge_generated_tokens_total") - before[0] < whole["tokens"]
    assert slow.metric("rkedge_prompt_tokens_total") - before[1] == whole["prompt_tokens"]


def test_why_an_answer_ended_is_known_later(slow: Any) -> None:
    for limit, reason in ((2, "length"), (100, "stop")):
        done = slow.lines("/sessions/w/messages", {"content": FIRST, "id": "q", "temperature": 0, "max_tokens": limit})[
            -1
        ]
        assert done["reason"] == slow.lines("/sessions/w/resume", {"id": "q"})[-1]["reason"] == reason
        slow.request("PUT", "/sessions/w", {"clear": True})


def test_an_answer_that_goes_on_keeps_to_its_limits(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon(port=False, **SLOW)
    for own, limit in (({}, 1), ({"max_tokens": 30}, 1), ({"max_tokens": 1}, 0)):
        change_broken(break_off(daemon, "a"), options={"temperature": 0, **own})
        (daemon.state / "daemon.yaml").write_text(f"limits: {{max_new_tokens: {limit}}}")
        reload(daemon)
        begun = daemon.request("GET", "/sessions/a")[2]["broken"]["text"]
        events = daemon.lines("/sessions/a/resume", {"id": "q"})
        assert (text_of(events), events[-1]["reason"]) == (begun, "length")
        assert daemon.request("GET", "/sessions/a")[2]["messages"][1]["content"] == begun
        (daemon.state / "daemon.yaml").write_text("")
        reload(daemon)
        daemon.request("DELETE", "/sessions/a")


def test_an_answer_broken_off_at_the_end_of_the_context_is_at_its_end(start_daemon: Callable[..., Any]) -> None:
    """The last tokens of the context are for answers, not for prompts; a resumed answer is the prompt of its run."""
    daemon = start_daemon("max_context: 64", port=False, **SLOW)
    first = daemon.lines("/sessions/b/messages", {"content": FIRST, "temperature": 0, "max_tokens": 1})[-1]
    for room in range(6):
        path = break_off(daemon, "a")
        begun = json.loads(path.read_bytes())["broken"]["tokens"]
        change_broken(path, tokens=(begun * 64)[: 64 - room - first["prompt_tokens"]])
        assert daemon.lines("/sessions/a/resume", {"id": "q"})[-1]["type"] == "done"
        daemon.request("DELETE", "/sessions/a")


def test_a_board_that_learns_the_date_late_goes_on_all_the_same(slow: Any) -> None:
    """Its clock begins in 1970, or where it was switched off; after a new start the date is all there is."""
    path = break_off(slow, "x")
    for then, status in (({"boot": "another", "at": 0}, 404), ({"boot": "", "at": 0}, 404), ({}, 200)):
        before = path.read_text()
        change_broken(path, **{"at": 0, **then})
        assert slow.request("POST", "/sessions/x/resume", {"id": "q"})[0] == status
        if status == 404:
            path.write_text(before)


def test_another_model_of_the_same_name_does_not_go_on(slow: Any) -> None:
    path = break_off(slow, "y")
    change_broken(path, model=slow.request("GET", "/status")[2]["model"])
    status, _, body = slow.request("POST", "/sessions/y/resume", {"id": "q"})
    assert status == 404
    assert "another model" in body["error"]["message"]


def test_a_broken_answer_stays_as_it_is_if_something_else_is_asked(slow: Any) -> None:
    one, _ = begin_stream(slow, "/sessions/s/messages", {"content": FIRST, "temperature": 0}, b'{"type":"text"')
    one.close()
    slow.wait_until(lambda: "broken" in slow.request("GET", "/sessions/s")[2])
    slow.lines("/sessions/s/messages", {"content": "Does it work?", "max_tokens": 2})
    kept = slow.request("GET", "/sessions/s")[2]
    assert [item["content"] for item in kept["messages"]][::2] == [FIRST, "Does it work?"]
    assert QA[FIRST].startswith(kept["messages"][1]["content"])


def test_a_new_connection_takes_the_session_over(slow: Any) -> None:
    """The old connection may be dead without anybody knowing."""
    one, _ = begin_stream(slow, "/sessions/t/messages", {"content": FIRST, "id": "q", "temperature": 0}, b'"text"')
    events = slow.lines("/sessions/t/resume", {"id": "q", "received": 0})
    assert text_of(events) == QA[FIRST]
    rest = b""
    while not rest.endswith(b"\r\n0\r\n\r\n"):
        rest += one.recv(1 << 16)
    assert b'"type":"error"' in rest
    one.close()


def test_sessions_outlive_the_daemon(start_daemon: Callable[..., Any]) -> None:
    first = start_daemon(port=False)
    first.lines("/sessions/a/messages", {"content": FIRST, "temperature": 0})
    assert first.stop() == 0
    second = start_daemon(port=False, STATE_DIRECTORY=first.environment["STATE_DIRECTORY"])
    kept = second.request("GET", "/sessions/a")[2]
    assert [item["content"] for item in kept["messages"]] == [FIRST, QA[FIRST]]


def test_answers_come_to_their_end_when_the_daemon_stops(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon(port=False, **SLOW)
    one, seen = begin_stream(daemon, "/sessions/a/messages", {"content": FIRST, "temperature": 0}, b'{"type":"text"')
    daemon.process.send_signal(signal.SIGTERM)
    while part := one.recv(1 << 16):
        seen += part
    assert b'"type":"done"' in seen
    assert daemon.process.wait(10) == 0
    one.close()


def test_what_a_stop_breaks_off_is_kept(start_daemon: Callable[..., Any]) -> None:
    """Answers of several sessions that do not come to their end in time are on the disk as far as they came."""
    daemon = start_daemon("limits: {stop_s: 1}", port=False, RKEMU_TOKEN_US="150000")
    asked = {"content": FIRST, "id": "1", "temperature": 0}
    one, _ = begin_stream(daemon, "/sessions/s0/messages", asked, b'{"type":"text"')
    waiting = [begin_stream(daemon, f"/sessions/s{number}/messages", asked, b"")[0] for number in (1, 2)]
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["queue"]["waiting"] == 2)
    connections = [one, *waiting]
    assert daemon.stop() == 0
    for one in connections:
        one.close()
    kept = [json.loads(path.read_bytes()) for path in daemon.state.rglob("s*.json")]
    assert len(kept) == 1
    assert kept[0]["broken"]["question"] == FIRST
    assert 0 < len(kept[0]["broken"]["text"]) < len(QA[FIRST])
    assert not list(daemon.state.rglob("*partial*"))
