"""The programs that are tried: how each is started, asked and ended."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.conformance import shims

START_SECONDS = 60
ANSWER_SECONDS = 60
END_SECONDS = 10
# As a board's pace. The servers read what has come every 5 ms until the run has ended, and drop what came last if the
# end comes sooner than that.
TOKEN_US = 20_000


class ClientError(Exception):
    """A program that did not start or answer; the text is for a person."""


@dataclass(frozen=True)
class Setup:
    """What every program gets.

    Attributes:
        model: the demo model, in the emulator's format.
        tokenizer: its tokenizer, in Hugging Face layout.
        library: gives the emulator's librkllmrt.so of a release.
        folder: where the program may write; its own.
        environment: what the servers' environment has besides the shims'.
    """

    model: Path
    tokenizer: Path
    library: Callable[[str], Path]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"RKEMU_TOKEN_US": str(TOKEN_US)})


class Client(ABC):
    """A program of someone else's."""

    def __init__(self, name: str, release: str) -> None:
        self.name, self.release = name, release

    @abstractmethod
    def answers(self, setup: Setup, questions: Sequence[str]) -> list[str]:
        """One answer per question. Raises ClientError; nothing of the program is left running."""


class LlmDemo(Client):
    """A build of the vendor's llm_demo.cpp: questions on stdin, answers between prompts on stdout."""

    def __init__(self, release: str, program: Path) -> None:
        super().__init__("vendor's llm_demo", release)
        self.program = program

    def answers(self, setup: Setup, questions: Sequence[str]) -> list[str]:
        environment = os.environ | {"LD_LIBRARY_PATH": str(setup.library(self.release).parent)}
        try:
            done = subprocess.run(
                [self.program, setup.model, "256", "4096"],
                input="\n".join([*questions, "exit\n"]),
                env=environment, cwd=setup.folder, text=True, capture_output=True, check=False,
                timeout=ANSWER_SECONDS * len(questions),
            )  # fmt: skip
        except OSError as error:
            raise ClientError(f"{self.program} cannot be started: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise ClientError("it hangs") from error
        if done.returncode != 0:
            raise ClientError(f"it ended with {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        turns = done.stdout.split("user: robot: ")[1:]
        return [turn.removesuffix("user: ").strip("\n") for turn in turns]


class Server(Client):
    """A program that answers over HTTP."""

    def __init__(self, name: str, release: str, python: Path, ask: Callable[[_Http, str], str]) -> None:
        super().__init__(name, release)
        self.python, self.ask = python, ask

    @abstractmethod
    def lay_out(self, setup: Setup, port: int) -> tuple[list[str], Path, Mapping[str, str]]:
        """Command, working folder, and what the environment has besides the shims'."""

    @contextmanager
    def running(self, setup: Setup) -> Iterator[tuple[int, int]]:
        """The server for the block: the port that it listens on, and its process. Raises ClientError."""
        port = shims.free_port()
        command, cwd, extra = self.lay_out(setup, port)
        environment = {**shims.environment(setup.folder, port), **setup.environment}
        environment |= {key: f"{value}:{environment[key]}" if key == "PYTHONPATH" else value
                        for key, value in extra.items()}  # fmt: skip
        log = setup.folder / "server.log"
        with log.open("wb") as output:
            process = _start(command, cwd, environment, output)
            try:
                _Http(port).wait(process)
                yield port, process.pid
            except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
                raise ClientError(f"{type(error).__name__}: {error}\n{_tail(log)}") from error
            finally:
                _end(process)

    def answers(self, setup: Setup, questions: Sequence[str]) -> list[str]:
        with self.running(setup) as (port, _):
            return [self.ask(_Http(port), question) for question in questions]


class FlaskServer(Server):
    """The vendor's flask_server.py of a release."""

    def __init__(self, name: str, release: str, python: Path, ask: Callable[[_Http, str], str], source: bytes) -> None:
        super().__init__(name, release, python, ask)
        self.source = source

    def lay_out(self, setup: Setup, port: int) -> tuple[list[str], Path, Mapping[str, str]]:
        (setup.folder / "flask_server.py").write_bytes(self.source)
        (setup.folder / "lib").mkdir()
        shutil.copy(setup.library(self.release), setup.folder / "lib" / "librkllmrt.so")
        command = [str(self.python), "flask_server.py", "--target_platform", "rk3588"]
        return [*command, "--rkllm_model_path", str(setup.model)], setup.folder, {}


class Rkllama(Server):
    """rkllama's server, with the emulator in the place of its librkllmrt.so and of its script for clocks."""

    def __init__(self, name: str, python: Path, ask: Callable[[_Http, str], str], package: Path) -> None:
        super().__init__(name, "1.3.0", python, ask)
        self.package = package

    def lay_out(self, setup: Setup, port: int) -> tuple[list[str], Path, Mapping[str, str]]:
        source = setup.folder / "src"
        shutil.copytree(self.package, source / "rkllama", ignore=shutil.ignore_patterns("*.so", "*.whl", "fix_freq*"))
        library = source / "rkllama" / "lib"
        library.mkdir(exist_ok=True)
        shutil.copy(setup.library(self.release), library / "librkllmrt.so")
        (library / "fix_freq_rk3588.sh").write_text("")
        model = setup.folder / "models" / "demo"
        model.mkdir(parents=True)
        (model / "demo.rkllm").symlink_to(setup.model)
        (model / "Modelfile").write_text('FROM="demo.rkllm"\nHUGGINGFACE_PATH="demo/demo"\n')
        shutil.copytree(setup.tokenizer, model / "tokenizer")
        command = [str(self.python), "-m", "rkllama.server.server", "--processor", "rk3588", "--port", str(port)]
        return [*command, "--models", str(model.parent)], setup.folder, {"PYTHONPATH": str(source)}


# --- how each is asked -------------------------------------------------------------------------------------------

_GREEDY = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0}


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def ask_flask(http: _Http, question: str) -> str:
    """The 1.2.3 server's own form."""
    reply = http.json("/rkllm_chat", {"model": "demo", "messages": _messages(question), "stream": False})
    return str(reply["choices"][-1]["message"]["content"])


def ask_openai(http: _Http, question: str) -> str:
    """OpenAI's chat completions, in one piece."""
    reply = http.json("/v1/chat/completions", {"model": "demo", "messages": _messages(question), **_GREEDY})
    return str(reply["choices"][0]["message"]["content"])


def ask_openai_stream(http: _Http, question: str) -> str:
    """The same as a stream of events."""
    body = {"model": "demo", "messages": _messages(question), "stream": True, **_GREEDY}
    events = [line.removeprefix("data: ") for line in http.lines("/v1/chat/completions", body) if line.strip()]
    if events.pop() != "[DONE]":
        raise ValueError("the stream does not end with [DONE]")
    choices = [choice for event in events for choice in json.loads(event)["choices"][:1]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def ask_ollama_stream(http: _Http, question: str) -> str:
    """Ollama's chat."""
    body = {"model": "demo", "messages": _messages(question), "stream": True, "options": _GREEDY}
    rows = [json.loads(line) for line in http.lines("/api/chat", body) if line.strip()]
    if not rows[-1]["done"]:
        raise ValueError("the stream does not end")
    return "".join(row["message"]["content"] for row in rows)


class _Http:
    """Requests to a server on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until it listens."""
        until = time.monotonic() + START_SECONDS
        while not self._listens():
            if process.poll() is not None:
                raise ValueError(f"it ended with {process.returncode}")
            if time.monotonic() > until:
                raise ValueError(f"it does not listen after {START_SECONDS} s")
            time.sleep(0.1)

    def _listens(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def json(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply to a POST."""
        return json.loads("\n".join(self.lines(path, body)))

    def lines(self, path: str, body: Mapping[str, Any]) -> Iterator[str]:
        """The lines of the reply to a POST, as they come."""
        with self._request("POST", path, json.dumps(body)) as reply:
            if reply.status != 200:
                raise ValueError(f"{path}: {reply.status} {reply.read(500).decode(errors='replace')}")
            for line in reply:
                yield line.decode().rstrip("\r\n")

    def _request(self, method: str, path: str, body: str | None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse()


def _start(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and all that it started: they are one process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
