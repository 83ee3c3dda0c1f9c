"""The daemon and servers of others, all with a library that computes nothing, and what they cost the machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conformance import clients, setup

from rkboard.emulator import build as emulator
from rkboard.emulator.abi_header import HEADER, header
from rkconvert.demo import checkpoint
from rkruntime import cli
from rkruntime.text.template import GEMMA
from rkruntime.text.tokenizer import Tokenizer

SENTENCE = "The RK3588 has an NPU of three cores. "
OURS, FLASK, RKLLAMA = "rkedge serve", "vendor's flask_server", "rkllama"
# A checkout of each peer, by the variable that names it.
VENDOR_VARIABLE, RKLLAMA_VARIABLE = "RKEDGE_BENCH_VENDOR", "RKEDGE_BENCH_RKLLAMA"
VENDOR_TAG = "release-v1.3.0"
_START_S = 30


@dataclass(frozen=True)
class Server:
    """A server to measure: where it takes chats in OpenAI's form, its model's name, and its process."""

    name: str
    url: str
    model: str
    pid: int

    def tree(self) -> list[int]:
        """The process and all below it."""
        pids = [self.pid]
        for pid in pids:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += map(int, children.read_text().split())
        return pids

    def cpu_s(self) -> float:
        """CPU time so far of all processes together, with their threads and children that have ended."""
        return sum(_cpu_clock(pid) + _ended_children_s(pid) for pid in self.tree())

    def own_cpu_s(self) -> float:
        """CPU time so far of the process alone, without those that it started."""
        return _cpu_clock(self.pid)

    def memory_mb(self, kind: str) -> float:
        """Memory of all processes together: `Rss` counts what they share several times, `Pss` once."""
        found = [Path(f"/proc/{pid}/smaps_rollup").read_text().split() for pid in self.tree()]
        return sum(int(words[words.index(f"{kind}:") + 1]) for words in found) * 1024 / 1e6


def empty_pythons(count: int, kind: str) -> float:
    """Memory of so many Pythons that import nothing: a limit for a program of as many processes."""
    with ExitStack() as running:
        command = [sys.executable, "-I", "-S", "-c", "import sys; print(flush=True); sys.stdin.read()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        found = [running.enter_context(subprocess.Popen(command, **pipes)) for _ in range(count)]
        for process in found:
            assert process.stdout is not None
            process.stdout.readline()
        return sum(Server("", "", "", process.pid).memory_mb(kind) for process in found)


def _cpu_clock(pid: int) -> float:
    """The process's CPU-time clock (clock_getcpuclockid(3)): nanoseconds instead of ticks, ended threads included."""
    return time.clock_gettime((~pid << 3) | 2)


def _ended_children_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")


def prepare(folder: Path) -> Path:
    """Make the library and its script in `folder`; the library."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("this benchmark needs a C++ compiler")
    source, library = Path(__file__).with_name("_canned.cc"), folder / "librkllmrt.so"
    (folder / HEADER).write_text(header("1.3.0"))
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", f"-I{folder}"]
    subprocess.run([compiler, *flags, "-o", library, source], check=True)
    script(folder, 10, 0)
    return library


def script(folder: Path, count: int, microseconds: int) -> list[str]:
    """Tell the library how many tokens to say and at what pace; their texts."""
    file = checkpoint() / "tokenizer.json"
    tokenizer = Tokenizer.parse(file.read_bytes(), file)
    tokens = tokenizer.encode(SENTENCE)
    texts = [tokenizer.decode([token]) for token in tokens]
    lines = [f"{count} {microseconds}", *(f"{token} {text}" for token, text in zip(tokens, texts, strict=True))]
    (folder / "script.new").write_text("\n".join(lines) + "\n")
    (folder / "script.new").rename(folder / "script")
    return [texts[at % len(texts)] for at in range(count)]


@contextmanager
def our_daemon(folder: Path | None = None) -> Iterator[Server]:
    """`rkedge serve` with Gemma 2's own template and the library of `folder`, or else the emulator."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(checkpoint(), f"{place}/checkpoint")
        (Path(place) / "checkpoint/chat_template.jinja").write_text(GEMMA)
        cli.main(["convert", f"{place}/checkpoint", "-q", "-o", f"{place}/canned"])
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
            end = time.monotonic() + _START_S
            while b"loaded canned" not in (here / "log").read_bytes():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit((here / "log").read_text())
                time.sleep(0.05)
            url = (here / "log").read_text().partition(", http://")[2].split()[0]
            yield Server(OURS, f"http://{url}/v1/chat/completions", "canned", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@contextmanager
def peers(folder: Path) -> Iterator[dict[str, Server]]:
    """The servers of others whose checkouts are named, unmodified, with the library of `folder`."""
    vendor, rkllama = os.environ.get(VENDOR_VARIABLE), os.environ.get(RKLLAMA_VARIABLE)
    with tempfile.TemporaryDirectory() as place, ExitStack() as running:
        here, found = Path(place), {}
        if vendor or rkllama:
            python = setup.interpreter(emulator.cache_folder().parent)
            model, tokenizer = setup.demo_model(here)
        for name, checkout in ((FLASK, vendor), (RKLLAMA, rkllama)):
            if not checkout:
                continue
            work = here / str(len(found))
            work.mkdir()
            given = clients.Setup(
                model, tokenizer, lambda _: folder / "librkllmrt.so", work, {"RKCANNED": f"{folder}/script"}
            )
            client = _client(name, Path(checkout), python, here)
            port, pid = running.enter_context(client.running(given))
            found[name] = Server(name, f"http://127.0.0.1:{port}/v1/chat/completions", "demo", pid)
        yield found


def _client(name: str, checkout: Path, python: Path, here: Path) -> clients.Server:
    if name == FLASK:
        source = setup.from_git(checkout, VENDOR_TAG, setup.FLASK)
        return clients.FlaskServer(name, "1.3.0", python, clients.ask_openai_stream, source)
    package = setup.rkllama_package(checkout, here)
    return clients.Rkllama(name, python, clients.ask_openai_stream, package)


def versions() -> dict[str, str]:
    """What the peers are, for the record."""
    found = {}
    for variable, name in ((VENDOR_VARIABLE, FLASK), (RKLLAMA_VARIABLE, RKLLAMA)):
        if checkout := os.environ.get(variable):
            revision = VENDOR_TAG if name == FLASK else "HEAD"
            command = ["git", "-C", checkout, "rev-parse", "--short=10", f"{revision}^{{commit}}"]
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found
