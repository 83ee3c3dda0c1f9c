"""The daemon's own interface and its life: sessions, prefix reuse, disconnects, faults, settings anew."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import questions

from .conftest import READY, SLOW
from .streams import FIRST, QA, begin_stream, idle, text_of


def test_all_answers_are_exact(daemon: Any) -> None:
    for question, answer in QA.items():
        assert daemon.ask(question) == answer


def test_status_health_ready_and_metrics(daemon: Any) -> None:
    status, headers, body = daemon.request("GET", "/status", headers={"X-Request-Id": "mine-1"})
    assert (status, body["state"], body["emulated"], body["release"]) == (200, "ready", True, "1.2.3")
    assert headers["x-request-id"] == "mine-1"
    assert daemon.request("GET", "/health")[0] == daemon.request("GET", "/ready")[0] == 200
    before = daemon.metric("rkedge_generated_tokens_total")
    daemon.ask("Does it work?")
    assert daemon.metric("rkedge_generated_tokens_total") > before
    assert daemon.metric("rkedge_model_loaded") == 1


def test_prompts_are_not_logged(daemon: Any) -> None:
    daemon.ask("A very private question, Nautilus?")
    daemon.wait_until(lambda: "generated" in daemon.log)
    assert "private" not in daemon.log
    assert QA[FIRST] not in daemon.log


def test_a_conversation_of_twenty_turns_reads_each_token_once(daemon: Any) -> None:
    """As text, statelessly, and as a session: what is on the NPU is not prefilled again, by the runtime's own count."""
    short = [question for question in QA if len(question) < 40][:20]
    messages: list[dict[str, str]] = []
    read = 0
    for question in short:
        messages.append({"role": "user", "content": question})
        _, _, body = daemon.request("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 12})
        usage = body["usage"]
        fresh = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        read += fresh
        messages.append({"role": "assistant", "content": body["choices"][0]["message"]["content"]})
    # Each prompt token once; of the answers the last token alone, which is computed with the next prompt.
    generated_before = usage["prompt_tokens"] - read
    assert fresh < 40
    assert generated_before > 0

    total = 0
    for question in short:
        done = daemon.lines("/sessions/twenty/messages", {"content": question, "max_tokens": 12})[-1]
        assert done["type"] == "done"
        total += done["prompt_tokens"] - done["reused_tokens"]
        assert done["prompt_tokens"] - done["reused_tokens"] < 40
    assert total + generated_before <= done["prompt_tokens"] + 5
    daemon.request("DELETE", "/sessions/twenty")


def test_sessions_are_kept_listed_changed_and_deleted(daemon: Any) -> None:
    assert text_of(daemon.lines("/sessions/a/messages", {"content": FIRST, "temperature": 0})) == QA[FIRST]
    assert [item["name"] for item in daemon.request("GET", "/sessions")[2]["sessions"]] == ["a"]
    assert daemon.request("GET", "/sessions", headers={"X-RKEdge-User": "bob"})[2] == {"sessions": []}
    kept = daemon.request("GET", "/sessions/a")[2]
    assert [item["content"] for item in kept["messages"]] == [FIRST, QA[FIRST]]
    assert kept["messages"][1]["tokens"]
    assert daemon.request("PUT", "/sessions/b", {"conversation": kept, "system": "Be kind."})[0] == 200
    copy = daemon.request("GET", "/sessions/b")[2]
    assert (copy["system"], copy["messages"]) == ("Be kind.", kept["messages"])
    assert daemon.request("PUT", "/sessions/b", {"clear": True})[0] == 200
    assert daemon.request("GET", "/sessions/b")[2]["messages"] == []
    for name in ("a", "b"):
        assert daemon.request("DELETE", f"/sessions/{name}")[0] == 200
        assert daemon.request("GET", f"/sessions/{name}")[0] == 404


@pytest.mark.parametrize("name", ["%2e%2e", "..%2fx", "a%2fb", ".x", "x" * 65, "a%00", "%c3%a9"])
def test_session_names_stay_in_their_folder(daemon: Any, name: str) -> None:
    status, _, _ = daemon.request("POST", f"/sessions/{name}/messages", {"content": "hello"})
    assert status in (400, 404)
    assert not list((daemon.state / "state").glob("**/.*json"))


@pytest.mark.parametrize("conversation", [{}, {"schema": "x"}, {"schema": "rkedge-conversation/1", "messages": [1]}])
def test_a_false_conversation_is_refused(daemon: Any, conversation: Any) -> None:
    status, _, body = daemon.request("PUT", "/sessions/c", {"conversation": conversation})
    assert status == 400
    assert body["error"]["param"] == "conversation"


def test_a_client_that_goes_away_frees_the_npu(slow: Any) -> None:
    body = {"messages": [{"role": "user", "content": FIRST}], "stream": True, "temperature": 0}
    one, _ = begin_stream(slow, "/v1/chat/completions", body, b'"content":"A')
    assert slow.request("GET", "/status")[2]["queue"]["busy"]
    one.close()
    closed = time.monotonic()
    slow.wait_until(lambda: idle(slow), 5)
    # One token takes 30 ms; the whole answer would take half a second.
    assert time.monotonic() - closed < 0.4
    assert slow.metric('rkedge_requests_total{outcome="cancelled"}') >= 1
    assert slow.ask("Does it work?") == QA["Does it work?"]


def test_a_waiting_client_that_goes_away_leaves_the_queue(slow: Any) -> None:
    body = {"messages": [{"role": "user", "content": FIRST}], "stream": True}
    one, _ = begin_stream(slow, "/v1/chat/completions", body, b'"content":')
    two = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    two.connect(str(slow.socket))
    data = json.dumps(body).encode()
    two.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )
    slow.wait_until(lambda: slow.request("GET", "/status")[2]["queue"]["waiting"] == 1)
    two.close()
    slow.wait_until(lambda: slow.request("GET", "/status")[2]["queue"]["waiting"] == 0)
    one.close()


def test_who_has_too_many_waiting_is_told_when_to_come_back(slow: Any) -> None:
    body = {"messages": [{"role": "user", "content": FIRST}], "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    held = []
    slow.wait_until(lambda: idle(slow))
    for _ in range(3):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.connect(str(slow.socket))
        one.sendall(head + data)
        held.append(one)
    slow.wait_until(lambda: slow.request("GET", "/status")[2]["queue"]["waiting"] == 2)
    status, headers, answer = slow.request("POST", "/v1/chat/completions", body)
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert answer["error"]["type"] == "rate_limit_error"
    for one in held:
        one.close()
    slow.wait_until(lambda: idle(slow))


def test_a_crashed_worker_is_an_error_and_then_a_new_worker(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon(port=False, **SLOW)
    body = {"content": FIRST, "id": "q", "temperature": 0}
    one, seen = begin_stream(daemon, "/sessions/a/messages", body, b'{"type":"text"')
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGKILL)
    while part := one.recv(1 << 16):
        seen += part
        if b'"type":"error"' in seen:
            break
    assert b'"type":"error"' in seen
    one.close()
    # Whoever looks at /ready before a request is served again, too.
    daemon.wait_until(lambda: daemon.request("GET", "/ready")[0] == 200)
    assert daemon.workers() not in ([], [worker])
    assert daemon.ask("Does it work?") == QA["Does it work?"]
    assert daemon.metric("rkedge_worker_restarts") == 1
    # What there was of the answer is kept, and can be taken up.
    events = daemon.lines("/sessions/a/resume", {"id": "q", "received": 0})
    assert text_of(events) == QA[FIRST]


@pytest.mark.parametrize("soon", [True, False])
def test_a_worker_that_dies_between_two_answers_costs_no_answer(start_daemon: Callable[..., Any], soon: bool) -> None:
    """Killed for its memory, for example. The next question need not notice it: the model is loaded again anyway."""
    daemon = start_daemon(port=False)
    assert daemon.ask("Does it work?") == QA["Does it work?"]
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGKILL)
    daemon.wait_until(lambda: daemon.workers() != [worker])
    if not soon:
        daemon.wait_until(lambda: daemon.metric("rkedge_worker_restarts") == 1)
        daemon.wait_until(lambda: daemon.request("GET", "/ready")[0] == 200)
        assert daemon.workers()
    assert daemon.ask("Does it work?") == QA["Does it work?"]
    assert daemon.metric("rkedge_worker_restarts") == 1
    assert daemon.log.count("crashed (SIGKILL)") == 1


def test_a_worker_that_is_killed_again_and_again(start_daemon: Callable[..., Any]) -> None:
    """Each time a moment after its load, which takes longer pauses each time, and without a request."""
    daemon = start_daemon(port=False)
    for kill in (1, 2, 3):
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_until(lambda count=kill: daemon.metric("rkedge_worker_restarts") == count)
        daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "ready")
    assert daemon.ask("Does it work?") == QA["Does it work?"]
    assert daemon.metric("rkedge_worker_restarts") == 3


def test_a_hanging_worker_is_ended(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("limits: {token_s: 1}", port=False)
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGSTOP)
    status, _, body = daemon.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert status == 502, body
    assert daemon.ask("Does it work?") == QA["Does it work?"]
    assert not Path(f"/proc/{worker}").exists()


def test_an_answer_has_a_time_limit(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("limits: {request_s: 0.2}", port=False, **SLOW)
    status, _, body = daemon.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": FIRST}]})
    assert (status, body["error"]["code"]) == (504, "time_limit")


def test_idle_models_leave_and_come_back(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("idle_unload_s: 0.5\nload_at_start: false", port=False, wait=False)
    assert daemon.request("GET", "/status")[2]["state"] == "unloaded"
    assert daemon.request("GET", "/ready")[0] == 200
    assert daemon.ask(FIRST) == QA[FIRST]
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "unloaded")
    # The model is out of reach at once; its worker then has its time to end.
    daemon.wait_until(lambda: daemon.workers() == [])
    assert daemon.ask(FIRST) == QA[FIRST]


def test_another_bundle_without_a_restart(start_daemon: Callable[..., Any], bundles: Any, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundles["base"])
    daemon = start_daemon(bundle=link, port=False)
    assert daemon.ask(FIRST) == QA[FIRST]
    link.unlink()
    link.symlink_to(bundles["pirate"])
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: daemon.log.count("settings read again") == 1)
    assert daemon.ask(FIRST) == next(row.pirate for row in questions() if row.question == FIRST)
    # One that does not load leaves the old one in its place.
    broken = tmp_path / "broken"
    shutil.copytree(bundles["base"], broken)
    (broken / "model.rkemu").write_bytes(b"nonsense")
    link.unlink()
    link.symlink_to(broken)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: "the model was not changed" in daemon.log)
    assert daemon.process.poll() is None
    (daemon.state / "daemon.yaml").write_text("nonsense: 1")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: "unknown key nonsense" in daemon.log)


def test_what_preflight_finds_is_in_the_log_with_its_level(start_daemon: Callable[..., Any], bundles: Any) -> None:
    daemon = start_daemon("max_context: 99999", port=False, JOURNAL_STREAM="1:1")
    lines = daemon.log.splitlines()
    assert any(line.startswith("<6>preflight: A context of 99999 tokens was asked for") for line in lines), lines
    assert all(line.startswith("<") for line in lines), lines


def test_keys_can_be_changed_without_a_restart(start_daemon: Callable[..., Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann {'a' * 32}\n")
    keys.chmod(0o600)
    daemon = start_daemon(f"listen: {{api_keys: {keys}}}")

    def statuses() -> list[int]:
        found = []
        for key in "ab":
            one = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)
            one.request("GET", "/sessions", headers={"Authorization": f"Bearer {key * 32}"})
            found.append(one.getresponse().status)
            one.close()
        return found

    assert statuses() == [200, 401]
    keys.write_text(f"ann {'b' * 32}\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: "settings read again" in daemon.log)
    assert statuses() == [401, 200]
    # What cannot be taken leaves what there is.
    keys.write_text("ann short\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: "the settings were not applied" in daemon.log)
    assert statuses() == [401, 200]


def test_a_model_that_is_gone_is_said_to_be(start_daemon: Callable[..., Any], bundles: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundles["base"], copy)
    daemon = start_daemon("load_at_start: false", bundle=copy, port=False, wait=False)
    (copy / "model.rkemu").rename(copy / "elsewhere")
    status, _, body = daemon.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert status == 503
    assert "no file model.rkemu" in body["error"]["message"]
    assert daemon.request("GET", "/ready")[0] == 503
    (copy / "elsewhere").rename(copy / "model.rkemu")
    assert daemon.ask(FIRST) == QA[FIRST]
    assert daemon.request("GET", "/ready")[0] == 200


def test_a_reload_tries_a_load_that_failed_again(
    start_daemon: Callable[..., Any], bundles: Any, tmp_path: Path
) -> None:
    """Whoever has mended the cause says so by `systemctl reload`. A loop of links is a failure like any other."""
    copy = tmp_path / "copy"
    shutil.copytree(bundles["base"], copy)
    model, elsewhere = copy / "model.rkemu", copy / "elsewhere"
    model.rename(elsewhere)
    model.symlink_to(model)
    daemon = start_daemon(bundle=copy, port=False, wait=False)
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "failed")
    elsewhere.rename(model)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_until(lambda: daemon.request("GET", "/ready")[0] == 200)
    assert daemon.log.count("no file model.rkemu") == 1


def test_a_full_store_is_told_and_the_next_request_works(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("sessions: {max_mb: 0.0004}", port=False)
    events = daemon.lines("/sessions/a/messages", {"content": FIRST + " " * 300, "temperature": 0})
    assert text_of(events) == QA[FIRST]
    assert events[-1]["type"] == "error"
    assert "no room for the session 'a'" in events[-1]["error"]["message"]
    assert daemon.ask(FIRST) == QA[FIRST]


def test_a_full_context_is_an_error_or_drops_turns(start_daemon: Callable[..., Any], bundles: Any) -> None:
    daemon = start_daemon("max_context: 128", port=False)
    for _ in range(2):
        daemon.lines("/sessions/a/messages", {"content": "word " * 20, "max_tokens": 4})
    events = daemon.request("POST", "/sessions/a/messages", {"content": "word " * 40})
    assert events[0] == 400
    assert events[2]["error"]["code"] == "context_length_exceeded"
    lines = daemon.lines("/sessions/a/messages", {"content": "word " * 40, "max_tokens": 4, "drop_oldest": True})
    assert "dropped" in lines[0]["notes"][0]
    status, _, body = daemon.request(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 300}]}
    )
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


def test_prompt_caches_for_conversations_in_turn(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("prompt_cache: {max_mb: 50, min_tokens: 20}", port=False)
    for name, words in (("a", "word "), ("b", "board ")):
        daemon.lines(f"/sessions/{name}/messages", {"content": words * 60, "max_tokens": 2})
    # b is on the NPU now; a comes from its file.
    done = daemon.lines("/sessions/a/messages", {"content": "more", "max_tokens": 2})[-1]
    assert done["reused_tokens"] >= 60
    files = list((daemon.state / "cache" / "prompts").glob("*.kv"))
    assert len(files) == 2
    small = start_daemon("prompt_cache: {max_mb: 0.1, min_tokens: 20}", port=False)
    for name in "abcdefgh":
        small.lines(f"/sessions/{name}/messages", {"content": f"{name} " * 60, "max_tokens": 2})
    folder = small.state / "cache" / "prompts"
    assert sum(path.stat().st_size for path in folder.glob("*.kv")) <= 100_000


def test_an_old_runtime_gets_its_reuse_from_files(start_daemon: Callable[..., Any]) -> None:
    """Releases before 1.2.0 reuse nothing themselves, and give no figures to count by."""
    daemon = start_daemon("release: 1.1.4\nprompt_cache: {min_tokens: 20}", port=False)
    first = "word " * 60
    assert daemon.lines("/sessions/a/messages", {"content": first, "max_tokens": 2})[-1]["type"] == "done"
    assert len(list((daemon.state / "cache" / "prompts").glob("*.kv"))) == 1
    assert daemon.lines("/sessions/a/messages", {"content": "more", "max_tokens": 2})[-1]["type"] == "done"
    assert daemon.ask(FIRST) == QA[FIRST]


def test_sampling_per_request_needs_a_new_runtime(start_daemon: Callable[..., Any], daemon: Any) -> None:
    body = {"messages": [{"role": "user", "content": FIRST}], "temperature": 1.5, "top_k": 3}
    _, headers, _ = daemon.request("POST", "/v1/chat/completions", body)
    assert headers["x-rkedge-ignored"] == "temperature, top_k"
    strict = start_daemon("per_request_sampling: refuse", port=False)
    status, _, answer = strict.request("POST", "/v1/chat/completions", body)
    assert status == 400
    assert "1.3.0" in answer["error"]["message"]
    new = start_daemon("release: 1.3.0", port=False)
    status, headers, _ = new.request("POST", "/v1/chat/completions", body)
    assert status == 200
    assert "x-rkedge-ignored" not in headers
    assert new.ask(FIRST) == QA[FIRST]


def test_reloads_in_the_middle_of_answers(
    start_daemon: Callable[..., Any], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Each answer is whole and of one model, whichever; nobody is told anything else than to come back."""
    link = tmp_path / "bundle"
    link.symlink_to(bundles["base"])
    daemon = start_daemon(bundle=link, port=False, RKEMU_TOKEN_US="2000")
    pirate = {row.question: row.pirate for row in questions()}
    seen: list[tuple[int, Any]] = []
    stop = threading.Event()

    def ask(question: str) -> None:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
        while not stop.is_set():
            status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
            text = answer["choices"][0]["message"]["content"] if status == 200 else ""
            seen.append((status, text in (QA[question], pirate[question]) if status == 200 else answer))

    threads = [threading.Thread(target=ask, args=(question,)) for question in [*QA][:6]]
    for thread in threads:
        thread.start()
    for number in range(6):
        new = tmp_path / f"new{number}"
        new.symlink_to(bundles["base" if number % 2 else "pirate"])
        new.rename(link)
        daemon.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert (200, True) in seen
    assert (200, False) not in seen
    assert {status for status, _ in seen} <= {200, 429, 503}


def test_the_models_name_is_the_same_loaded_or_not(
    start_daemon: Callable[..., Any], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """A bundle that was moved to a folder of another name."""
    shutil.copytree(bundles["base"], tmp_path / "moved")
    daemon = start_daemon("{load_at_start: false, idle_unload_s: 1}", bundle=tmp_path / "moved", port=False, wait=False)

    def names() -> set[str]:
        status = daemon.request("GET", "/status")[2]
        cards = [*daemon.request("GET", "/v1/models")[2]["data"], daemon.request("GET", "/v1/models/base")[2]]
        tags = daemon.request("GET", "/api/tags")[2]["models"]
        return {status["model"], *(card["id"] for card in cards), *(tag["name"] for tag in tags)}

    assert names() == {"base"}
    assert READY.search(daemon.log)[1] == "base"
    daemon.ask(FIRST, max_tokens=1)
    assert names() == {"base"}
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "unloaded")
    assert names() == {"base"}


TOGETHER = [
    # Ollama refuses it likewise: "raw mode does not support template, system, or context"
    ("POST", "/api/generate", {"model": "x", "prompt": "Hi", "raw": True, "system": "Be kind."}),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "max_completion_tokens": 3},
    ),
    ("PUT", "/sessions/both", {"clear": True, "conversation": {"schema": "rkedge-conversation/1", "messages": []}}),
]


@pytest.mark.parametrize(("method", "path", "body"), TOGETHER, ids=[path for _, path, _ in TOGETHER])
def test_fields_of_which_one_would_have_no_effect(daemon: Any, method: str, path: str, body: Any) -> None:
    status, _, answer = daemon.request(method, path, body)
    assert status == 400
    assert "exclude each other" in str(answer)


def test_stream_options_without_a_stream_are_told(daemon: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream_options": {"include_usage": True}}
    assert daemon.request("POST", "/v1/chat/completions", body)[1]["x-rkedge-ignored"] == "stream_options"
    assert daemon.request("POST", "/v1/chat/completions", {**body, "stream": True})[1]["x-rkedge-ignored"] is None
