"""An answer that is resumed: always the rest of what the client has, or an error."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import questions
from rkruntime.chat.attach import UnixConnection

from .conftest import READY

QA = {row.question: row.answer for row in questions()}
FIRST, SECOND = "What is the RK3588?", "Does it work?"
# So slow that a client can leave within the prompt, and random enough that no two generations are alike.
SLOW = {"RKEMU_TOKEN_US": "20000", "RKEMU_PROMPT_TOKEN_US": "60000"}
RANDOM = "temperature: 4\ntop_k: 1000\ntop_p: 1\nlimits: {max_new_tokens: 80}"


def text_of(lines: bytes) -> str:
    return "".join(event.get("text", "") for event in map(json.loads, lines.splitlines()))


def part(daemon: Any, path: str, body: Any, pieces: int) -> str:
    """The text of so many pieces of an answer; then the client leaves."""
    connection = UnixConnection(daemon.socket)
    connection.request("POST", path, json.dumps(body))
    seen = ""
    if pieces:
        response = connection.getresponse()
        assert response.status == 200, response.read()
        while pieces:
            if text := text_of(response.readline()):
                seen, pieces = seen + text, pieces - 1
        response.close()
    connection.close()
    return seen


def contents(daemon: Any, name: str) -> list[str]:
    return [item["content"] for item in daemon.request("GET", f"/sessions/{name}")[2].get("messages", ())]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("before", ["complete", "partial", "none"])
def test_a_question_lost_in_its_prompt_does_not_get_the_answer_before(
    start_daemon: Callable[..., Any], before: str
) -> None:
    daemon = start_daemon("temperature: 0", port=False, **SLOW)
    if before != "none":
        part(daemon, "/sessions/s/messages", {"content": FIRST, "id": "A"}, 3)
        daemon.wait_until(lambda: len(contents(daemon, "s")) == 2)
    if before == "complete":
        daemon.request("POST", "/sessions/s/resume", {"id": "A"})
    old = contents(daemon, "s") if before != "none" else []
    answers = daemon.metric("rkedge_generated_tokens_total")
    connection = UnixConnection(daemon.socket)
    connection.request("POST", "/sessions/s/messages", json.dumps({"content": SECOND, "id": "B"}))
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["queue"]["busy"])
    time.sleep(0.2)  # nobody can see that the run itself has begun
    connection.close()
    daemon.wait_until(lambda: not daemon.request("GET", "/status")[2]["queue"]["busy"])
    assert daemon.metric("rkedge_generated_tokens_total") == answers, "it had a token already"
    status, _, body = daemon.request("POST", "/sessions/s/resume", {"id": "B", "received": 0})
    assert (status, body["error"]["code"]) == (404, "session_not_found")
    if old:
        assert contents(daemon, "s") == old
        assert daemon.request("POST", "/sessions/s/resume", {"id": "A"})[0] == 200
    answer = text_of(daemon.request("POST", "/sessions/s/messages", {"content": SECOND, "id": "B"})[2])
    assert contents(daemon, "s")[-2:] == [SECOND, answer]
    assert answer == QA[SECOND]


@pytest.mark.parametrize("data", [{}, {"reason": "stop", "messages": []}], ids=["no turn", "no message"])
def test_a_number_without_its_turn_is_not_an_answer(
    start_daemon: Callable[..., Any], tmp_path: Path, data: dict[str, Any]
) -> None:
    daemon = start_daemon("temperature: 0", port=False)
    daemon.lines("/sessions/s/messages", {"content": FIRST, "id": "A"})
    (path,) = (daemon.state / "state").rglob("s.json")
    kept = json.loads(path.read_bytes())
    del kept["reason"]
    path.write_text(json.dumps(kept | {"number": "B"} | data))
    assert daemon.request("POST", "/sessions/s/resume", {"id": "B"})[0] == 404


@pytest.mark.parametrize("loss", ["kill", "full disk"])
def test_two_generations_are_never_mixed(start_daemon: Callable[..., Any], small_disk: Path, loss: str) -> None:
    daemon = start_daemon(f"{RANDOM}\nsessions: {{folder: {small_disk}/s}}", port=False, RKEMU_TOKEN_US="40000")
    seen = part(daemon, "/sessions/s/messages", {"content": FIRST, "id": "A"}, 4)
    daemon.wait_until(lambda: len(contents(daemon, "s")) == 2)
    if loss == "full disk":
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)
    kept = contents(daemon, "s")[1]
    more = seen + part(daemon, "/sessions/s/resume", {"id": "A", "received": len(seen)}, 8)
    assert len(more) > len(kept)
    if loss == "kill":
        daemon.kill()
        daemon.restart()
        daemon.wait_until(lambda: len(READY.findall(daemon.log)) == 2)
    else:
        daemon.wait_until(lambda: "was not saved" in daemon.log)
        filler.unlink()
    for _ in range(2):
        # The refusal begins no run, which would make what is kept longer.
        assert daemon.request("POST", "/sessions/s/resume", {"id": "A", "received": len(more)})[0] == 404
        assert contents(daemon, "s")[1] == kept
    # Who has less gets the rest of what is kept.
    body = {"id": "A", "received": len(seen), "sha256": sha256(seen)}
    rest = text_of(daemon.request("POST", "/sessions/s/resume", body)[2])
    assert contents(daemon, "s") == [FIRST, seen + rest]
    assert (seen + rest).startswith(kept)
    # Now that it is long enough, only its hash tells another generation.
    other = (seen + rest)[:-1] + "?!"[rest[-1] == "?"]
    body = {"id": "A", "received": len(other), "sha256": sha256(other)}
    assert daemon.request("POST", "/sessions/s/resume", body)[0] == 404
    assert daemon.request("POST", "/sessions/s/resume", {"id": "A", "received": len(seen + rest) + 1})[0] == 404


def test_an_answer_is_not_resumed_under_another_system_prompt(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("temperature: 0", port=False, RKEMU_TOKEN_US="40000")
    seen = part(daemon, "/sessions/s/messages", {"content": FIRST, "id": "A"}, 4)
    for body in ({}, {"system": ""}):
        assert daemon.request("PUT", "/sessions/s", body)[0] == 200
        assert "broken" in daemon.request("GET", "/sessions/s")[2]
    daemon.request("PUT", "/sessions/s", {"system": "Be kind."})
    kept = daemon.request("GET", "/sessions/s")[2]
    assert kept["system"] == "Be kind."
    assert kept["messages"][0]["content"] == FIRST
    assert kept["messages"][1]["content"].startswith(seen)
    assert not {"number", "broken", "reason"} & set(kept)
    assert daemon.request("POST", "/sessions/s/resume", {"id": "A", "received": len(seen)})[0] == 404
    assert contents(daemon, "s") == [item["content"] for item in kept["messages"]]


def test_a_partial_answer_with_another_beginning_is_not_resumed(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("temperature: 0", port=False, RKEMU_TOKEN_US="40000")
    seen = part(daemon, "/sessions/s/messages", {"content": FIRST, "id": "A"}, 4)
    daemon.wait_until(lambda: len(contents(daemon, "s")) == 2)
    for wrong in ("X" + seen[1:], seen[:-1] + "X"):
        body = {"id": "A", "received": len(wrong), "sha256": sha256(wrong)}
        assert daemon.request("POST", "/sessions/s/resume", body)[0] == 404
    body = {"id": "A", "received": len(seen), "sha256": sha256(seen)}
    assert seen + text_of(daemon.request("POST", "/sessions/s/resume", body)[2]) == QA[FIRST]
