"""Four boards behind one address, by real proxies: one board is killed under load and comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import APIStatusError, OpenAI, OpenAIError
from tests.runtime.serve.conftest import start_daemon  # noqa: F401
from tests.runtime.serve.sshd import free_port

from rkconvert.demo import questions
from rkruntime import cli

QA = {row.question: row.answer for row in questions()}
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
# Its environment is large, so nothing here installs it: python -m venv DIR && DIR/bin/pip install 'litellm[proxy]'
LITELLM = os.environ.get("RKEDGE_LITELLM") or shutil.which("litellm")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt install nginx-light)")
needs_litellm = pytest.mark.skipif(
    LITELLM is None, reason="litellm is not installed (pip install 'litellm[proxy]', and name it in RKEDGE_LITELLM)"
)
SHARED = "shared-key-of-the-clients"
CLIENTS = 10
# An answer takes half a second or more, so that some are on their way at any time.
SLOW = {"RKEMU_TOKEN_US": "20000"}


@dataclass
class Board:
    daemon: Any
    port: int
    key: str


def inventory(folder: Path, bundle: Path, ports: Sequence[int], **more: Any) -> Path:
    boards = {
        f"board-{at}": {"ssh": f"ann@board-{at}", "url": f"http://127.0.0.1:{port}", "key": f"KEY_{at}", **more}
        for at, port in enumerate(ports, 1)
    }
    path = folder / "boards.yaml"
    path.write_text(json.dumps({"bundle": str(bundle), "groups": {"all": {"boards": boards}}}))
    return path


@pytest.fixture(scope="module")
def boards(start_daemon: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Board]:  # noqa: F811
    """Four daemons on loopback, each with a key of its own for a proxy, and one that all of them know."""
    made = []
    for at in range(1, 5):
        folder, port, key = tmp_path_factory.mktemp("board"), free_port(), f"the-own-key-of-board-{at}"
        (folder / "keys").write_text(f"proxy {key}\nclients {SHARED}\n")
        (folder / "keys").chmod(0o600)
        settings = {"listen": {"port": port, "api_keys": str(folder / "keys")}}
        made.append(Board(start_daemon(json.dumps(settings), port=False, **SLOW), port, key))
    return made


@contextmanager
def running(words: Sequence[str], log: Path, url: str, **environment: str) -> Iterator[None]:
    """A proxy that answers at this address."""
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            end = time.monotonic() + 180
            while subprocess.run(["curl", "-sf", "-o", "/dev/null", url], check=False).returncode:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(30)


def nginx_command(folder: Path) -> list[str]:
    """nginx with nothing but the generated file."""
    places = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log stderr warn; events {{}}\n"
        f"http {{ access_log off; {places} include {folder}/rkedge.conf; }}\n"
    )
    return [str(NGINX), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


@dataclass(frozen=True)
class Asked:
    began: float
    ended: float
    stream: bool
    came: str  # right, wrong, or the error


class Load:
    """Clients that ask all the time, and compare what comes with what the model answers."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
        self._model, self._stop = model, threading.Event()
        self.asked: list[Asked] = []
        self._threads = [threading.Thread(target=self._go_on, args=(at,)) for at in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _go_on(self, number: int) -> None:
        texts = list(QA)
        at = number
        while not self._stop.is_set():
            question, stream, began = texts[at % len(texts)], at % 2 == 0, time.monotonic()
            at += 7
            try:
                answer = self._streamed(question) if stream else self._whole(question)
                came = "right" if answer == QA[question] else f"wrong: {answer!r}"
            except APIStatusError as error:
                came = f"{error.status_code}"
            except (OpenAIError, OSError) as error:
                came = type(error).__name__
            except Exception as error:  # of the client's own transport, which the package does not wrap in a stream
                came = f"{type(error).__module__}.{type(error).__name__}"
            self.asked.append(Asked(began, time.monotonic(), stream, came))

    def _request(self, question: str) -> dict[str, Any]:
        return {"model": self._model, "messages": [{"role": "user", "content": question}], "temperature": 0}

    def _whole(self, question: str) -> str:
        choice = self._client.chat.completions.create(**self._request(question)).choices[0]
        assert choice.finish_reason == "stop"
        return choice.message.content or ""

    def _streamed(self, question: str) -> str:
        text, reason = "", None
        for chunk in self._client.chat.completions.create(**self._request(question), stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        # Few clients look for it: an answer that ends without it and without an error is taken for a whole one.
        return text if reason == "stop" else f"{text} (and no end)"


def wait_for(holds: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def answered(board: Board) -> float:
    return float(board.daemon.metric('rkedge_requests_total{outcome="ok"}'))


def kill_one_under_load(boards: list[Board], load: Load) -> None:
    """All boards answer; one is killed in the middle of an answer, and comes back. Again, until that was a stream."""
    victim = boards[1]
    kills: list[float] = []
    wait_for(lambda: all(answered(board) > 3 for board in boards))
    while len(kills) < 8 and not any(one.stream and one.came != "right" for one in load.asked):
        kills.append(kill_and_restart(victim, load))
    print(f"\n{len(kills)} kills: {Counter((one.came, one.stream) for one in load.asked)}")
    assert not [one.came for one in load.asked if one.came.startswith("wrong")]
    errors = [one for one in load.asked if one.came != "right"]
    # What fails was on its way when the board was killed: at most one request of each client.
    for one in errors:
        assert any(one.began <= killed <= one.ended for killed in kills), (kills, one)
    assert 0 < len(errors) <= CLIENTS * len(kills)
    # An answer that comes whole or not at all is asked for again, of another board.
    assert not [one for one in errors if not one.stream]


def kill_and_restart(victim: Board, load: Load) -> float:
    """The others answer meanwhile, and it does afterwards. Returns when it was killed."""
    wait_for(lambda: victim.daemon.metric("rkedge_answer_tokens") > 2)
    killed = time.monotonic()
    victim.daemon.kill()
    wait_for(lambda: len([one for one in load.asked if one.began > killed and one.came == "right"]) > 3 * CLIENTS)
    victim.daemon.socket.unlink()
    victim.daemon.restart()
    wait_for(lambda: victim.daemon.socket.exists() and answered(victim) > 3)
    back = time.monotonic()
    wait_for(lambda: len([one for one in load.asked if one.began > back]) > 2 * CLIENTS)
    return killed


@pytest.mark.long
@pytest.mark.timeout(900)
@needs_nginx
def test_nginx_with_a_board_that_is_killed(boards: list[Board], bundles: dict[str, Path], tmp_path: Path) -> None:
    port = free_port()
    path = inventory(tmp_path, bundles["base"], [board.port for board in boards])
    words = ["fleet", "proxy", str(path), "--for", "nginx", "--listen", f"127.0.0.1:{port}"]
    assert cli.main([*words, "-o", str(tmp_path / "rkedge.conf")]) == 0
    url = f"http://127.0.0.1:{port}"
    with running(nginx_command(tmp_path), tmp_path / "log", f"{url}/health"), Load(url, SHARED, "base") as load:
        kill_one_under_load(boards, load)


@pytest.mark.long
@pytest.mark.timeout(900)
@needs_litellm
def test_litellm_with_a_board_that_is_killed(boards: list[Board], bundles: dict[str, Path], tmp_path: Path) -> None:
    port, master = free_port(), "sk-the-proxys-own-key"
    path = inventory(tmp_path, bundles["base"], [board.port for board in boards])
    assert cli.main(["fleet", "proxy", str(path), "--for", "litellm", "-o", str(tmp_path / "config.yaml")]) == 0
    keys = {f"KEY_{at}": board.key for at, board in enumerate(boards, 1)}
    words = [str(LITELLM), "--config", str(tmp_path / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    environment = {**keys, "LITELLM_MASTER_KEY": master, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    model = yaml.safe_load((tmp_path / "config.yaml").read_text())["model_list"][0]["model_name"]
    with (
        running(words, tmp_path / "log", f"{url}/health/liveliness", **environment),
        Load(url, master, model) as load,
    ):
        kill_one_under_load(boards, load)
