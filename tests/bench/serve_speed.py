"""The daemon's own part from a token to the client: rate, first token, characters lost, CPU time, memory.

The library behind it computes nothing, so what is measured is the server's. Others can be measured side by side in the
same run, with the same library behind them:

    python -m tests.bench.serve_speed --prepare FOLDER      makes FOLDER/librkllmrt.so (RKLLM 1.3.0) and FOLDER/script
    (start the other server with that library and RKCANNED=FOLDER/script in its environment)
    RKEDGE_BENCH_FOLDER=FOLDER RKEDGE_BENCH_PEERS='NAME=URL,MODEL,PID ...' python -m tests.bench.serve_speed

URL is where it takes chats in OpenAI's form; CPU time and memory are those of process PID and its children. An answer
that is an error ends the benchmark: there is no figure for it.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rkboard.emulator.abi_header import HEADER, header
from rkconvert.demo import checkpoint
from rkruntime import cli
from rkruntime.text.tokenizer import Tokenizer

SENTENCE = "The RK3588 has an NPU of three cores. "
FAST, SLOW, SHORT = (20_000, 0), (1_000, 2_000), (100, 200)
ANSWERS = 100


@dataclass(frozen=True)
class Server:
    """A server to measure: where it takes chats, its model's name, and its process."""

    name: str
    url: str
    model: str
    pid: int

    def _tree(self) -> list[int]:
        """The process and all below it."""
        pids = [self.pid]
        for pid in pids:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += map(int, children.read_text().split())
        return pids

    def cpu_s(self) -> float:
        """CPU time so far, all processes together."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self._tree()]
        return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Resident, all processes together."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._tree())
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def ask(self) -> tuple[float, float, str]:
        """Seconds to the first text and to the end, and the text, of one streamed answer."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        body = {"model": self.model, "messages": [{"role": "user", "content": "Go."}], "stream": True}
        connection.connect()
        start = time.perf_counter()
        connection.request("POST", parts.path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        chunks: list[bytes] = []
        first = 0.0
        while chunk := response.read1(1 << 16):
            chunks.append(chunk)
            if not first and _text(b"".join(chunks)):
                first = time.perf_counter() - start
        total = time.perf_counter() - start
        connection.close()
        text = _text(b"".join(chunks))
        if response.status != 200 or not text:
            raise SystemExit(f"{self.name} answered {response.status}: {b''.join(chunks)[:500]!r}")
        return first, total, text


def _text(stream: bytes) -> str:
    """The contents of a stream of events, whole lines only."""
    texts = []
    for line in stream.decode("utf-8", "replace").splitlines():
        try:
            event = json.loads(line.removeprefix("data: "))
        except ValueError:
            continue
        choices = event.get("choices", ()) if isinstance(event, dict) else ()
        texts += [(choice.get("delta") or choice.get("message") or {}).get("content") or "" for choice in choices]
    return "".join(texts)


def prepare(folder: Path) -> None:
    """Make the library and its script in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("this benchmark needs a C++ compiler")
    source = Path(__file__).with_name("_canned.cc")
    (folder / HEADER).write_text(header("1.3.0"))
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", f"-I{folder}"]
    subprocess.run([compiler, *flags, "-o", folder / "librkllmrt.so", source], check=True)
    script(folder, SHORT)


def script(folder: Path, pace: tuple[int, int]) -> str:
    """Tell the library how many tokens and how fast; the text that makes."""
    tokenizer = Tokenizer.load(checkpoint() / "tokenizer.json")
    tokens = tokenizer.encode(SENTENCE)
    texts = [tokenizer.decode([token]) for token in tokens]
    lines = [f"{pace[0]} {pace[1]}", *(f"{token} {text}" for token, text in zip(tokens, texts, strict=True))]
    (folder / "script.new").write_text("\n".join(lines) + "\n")
    (folder / "script.new").rename(folder / "script")
    return "".join(texts[at % len(texts)] for at in range(pace[0]))


@contextmanager
def our_daemon(folder: Path | None = None) -> Iterator[Server]:
    """`rkedge serve` with the library of `folder`, or else with the emulator."""
    with tempfile.TemporaryDirectory() as place:
        cli.main(["convert", str(checkpoint()), "-q", "-o", f"{place}/canned"])
        library = folder / "librkllmrt.so" if folder else None
        with daemon_of(Path(place), library, RKCANNED=f"{folder}/script") as server:
            yield server


@contextmanager
def daemon_of(here: Path, library: Path | None = None, **environment: str) -> Iterator[Server]:
    """`rkedge serve` with the bundle `canned` in a folder, where its files go, too."""
    with (here / "log").open("wb") as log:
        command = [sys.executable, "-m", "rkruntime.cli", "serve", str(here / "canned"), "--port", "0"]
        command += ["--socket", str(here / "socket")]
        state = {"STATE_DIRECTORY": str(here), "CACHE_DIRECTORY": str(here), **environment}
        if library:
            command += ["--library", str(library), "--force"]
        process = subprocess.Popen(command, env={**os.environ, **state}, stderr=log)
        try:
            end = time.monotonic() + 30
            while b"loaded canned" not in (here / "log").read_bytes():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit((here / "log").read_text())
                time.sleep(0.05)
            url = (here / "log").read_text().partition(", http://")[2].split()[0]
            yield Server("rkedge serve", f"http://{url}/v1/chat/completions", "canned", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def measure(server: Server, folder: Path) -> dict[str, str]:
    """The row of one server."""
    row = {}
    script(folder, SHORT)
    for _ in range(5):
        server.ask()
    row["memory MB"] = f"{server.memory_mb():.0f}"
    row["first ms"] = f"{statistics.median(server.ask()[0] for _ in range(30)) * 1000 - SHORT[1] / 1000:.2f}"
    for name, pace, times in (("0 us", FAST, 3), ("2 ms", SLOW, 2)):
        script(folder, pace)
        before = server.cpu_s()
        asked = [server.ask() for _ in range(times)]
        cpu = (server.cpu_s() - before) / (pace[0] * times / 1000)
        row[f"tokens/s, {name}"] = f"{statistics.median(pace[0] / (total - 0.02) for _, total, _ in asked):,.0f}"
        row[f"CPU ms/1000 tokens, {name}"] = f"{cpu * 1000:.0f}"
    expected = script(folder, SHORT)
    row[f"characters lost in {ANSWERS} answers"] = str(
        sum(len(expected) - len(server.ask()[2]) for _ in range(ANSWERS))
    )
    return row


def main() -> None:
    """Measure our daemon and all peers that were named."""
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]))
        return
    given = os.environ.get("RKEDGE_BENCH_FOLDER")
    folder = Path(given or tempfile.mkdtemp(prefix="rkedge-bench-"))
    if not given:
        prepare(folder)
    peers = []
    for peer in os.environ.get("RKEDGE_BENCH_PEERS", "").split():
        name, _, rest = peer.partition("=")
        url, model, pid = rest.split(",")
        peers.append(Server(name, url, model, int(pid)))
    with our_daemon(folder) as ours:
        rows = {server.name: measure(server, folder) for server in (ours, *peers)}
    width = max(map(len, next(iter(rows.values()))))
    print(f"{'':{width}}" + "".join(f"{name:>16}" for name in rows))
    for name in next(iter(rows.values())):
        print(f"{name:{width}}" + "".join(f"{row[name]:>16}" for row in rows.values()))
    if not peers:
        print("No other server was named in RKEDGE_BENCH_PEERS.")


if __name__ == "__main__":
    main()
