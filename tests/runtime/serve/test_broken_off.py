"""A daemon that is killed, or a worker that dies, in mid-answer: no client takes the part for the whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from rkconvert.demo import questions

FIRST = "What is the RK3588?"
WHOLE = {row.question: row.answer for row in questions()}[FIRST]
MESSAGES: Any = [{"role": "user", "content": FIRST}]


def _openai(url: str) -> Iterator[str]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        for chunk in client.chat.completions.create(model="x", messages=MESSAGES, stream=True):
            yield chunk.choices[0].delta.content or ""


def _openai_completion(url: str) -> Iterator[str]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        prompt = f"<start_of_turn>user\n{FIRST}<end_of_turn>\n<start_of_turn>model\n"
        for chunk in client.completions.create(model="x", prompt=prompt, max_tokens=50, stream=True):
            yield chunk.choices[0].text


def _ollama_chat(url: str) -> Iterator[str]:
    for part in ollama.Client(host=url).chat(model="x", messages=MESSAGES, stream=True):
        yield part.message.content or ""


def _ollama_generate(url: str) -> Iterator[str]:
    for part in ollama.Client(host=url).generate(model="x", prompt=FIRST, stream=True):
        yield part.response


def _own(url: str) -> Iterator[str]:
    """As a program without a library for it would: until `done` or `error`."""
    with httpx.stream("POST", f"{url}/sessions/a/messages", json={"content": FIRST}) as response:
        for line in response.iter_lines():
            event = json.loads(line)
            if event["type"] == "error":
                raise httpx.HTTPError(event["error"]["message"])
            yield event.get("text", "")


CLIENTS = [_openai, _openai_completion, _ollama_chat, _ollama_generate, _own]
TOLD = (httpx.HTTPError, openai.OpenAIError, ollama.ResponseError, ConnectionError)


BROKEN = [("daemon", client) for client in CLIENTS] + [("worker", client) for client in (_openai, _ollama_chat, _own)]


@pytest.mark.parametrize(("how", "client"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_stream_that_breaks_off_is_an_error(
    start_daemon: Callable[..., Any], how: str, client: Callable[[str], Iterator[str]]
) -> None:
    daemon = start_daemon(RKEMU_TOKEN_US="100000")
    said = ""
    with pytest.raises(TOLD):
        for piece in client(daemon.url):
            if piece and not said:
                if how == "daemon":
                    daemon.kill()
                else:
                    os.kill(daemon.workers()[0], signal.SIGKILL)
            said += piece
    assert said
    assert said != WHOLE


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh that runs the command here."""
    program = tmp_path / "ssh"
    program.write_text('#!/bin/sh\nshift 2\nexec sh -c "$*"\n')
    program.chmod(0o755)
    monkeypatch.setenv("RKEDGE_SSH", str(program))


def start_chat(daemon: Any) -> subprocess.Popen[str]:
    attach = f"{sys.executable} -m rkruntime.cli attach --socket {daemon.socket}"
    environment = {**os.environ, "RKEDGE_ATTACH": attach}
    command = [sys.executable, "-m", "rkruntime.cli", "chat", "me@board", "--session", "m", "--temperature", "0"]
    pipe = subprocess.PIPE
    chat = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert chat.stdin is not None
    chat.stdin.write(f"{FIRST}\n")
    chat.stdin.close()
    chat.stdin = None
    return chat


def test_chat_goes_on_when_the_daemon_comes_back(start_daemon: Callable[..., Any], ssh: None) -> None:
    """Stopped with no time for the answer: what there is of it is kept, and the next daemon goes on with it."""
    daemon = start_daemon("limits: {stop_s: 0.2}", port=False, RKEMU_TOKEN_US="200000")
    chat = start_chat(daemon)
    assert chat.stdout is not None
    first = chat.stdout.read(1)
    daemon.restart(RKEMU_TOKEN_US="0")
    out, err = chat.communicate(timeout=60)
    assert (first + out, chat.returncode) == (f"{WHOLE}\n", 0), err


def test_chat_says_that_an_answer_is_lost(start_daemon: Callable[..., Any], ssh: None) -> None:
    daemon = start_daemon(port=False, RKEMU_TOKEN_US="200000")
    chat = start_chat(daemon)
    assert chat.stdout is not None
    first = chat.stdout.read(1)
    daemon.kill()
    daemon.restart(RKEMU_TOKEN_US="0")
    out, err = chat.communicate(timeout=60)
    assert chat.returncode == 8, err
    assert "has not kept it" in err
    assert (first + out).strip() in WHOLE


def test_curl(start_daemon: Callable[..., Any]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    daemon = start_daemon(RKEMU_TOKEN_US="200000")
    body = json.dumps({"content": FIRST})
    url = f"{daemon.url}/sessions/a/messages"
    with subprocess.Popen(["curl", "-sN", "-d", body, url], stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        curl.stdout.readline()
        daemon.kill()
        curl.stdout.read()
    assert curl.returncode == 18  # CURLE_PARTIAL_FILE
