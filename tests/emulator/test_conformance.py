"""The runner that asks other people's programs, and the page that tells them how: with a program of our own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rkboard.emulator import build as emulator
from rkconvert.demo import questions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, library: Any) -> Any:
    """ask.cc, built for a release: `program("1.2.3")`."""
    folder = tmp_path_factory.mktemp("programs")

    def build(release: str) -> Path:
        target = folder / f"ask-{release}"
        compiler = emulator.find_compiler().command
        options = ["-std=c++17", "-I", library(release).parent]
        linking = ["-L", library(release).parent, "-lrkllmrt"]
        subprocess.run([*compiler, *options, ROOT / "tests/emulator/ask.cc", "-o", target, *linking], check=True)
        return target

    return build


def conformance(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.conformance", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_a_program_that_answers_passes(program: Any) -> None:
    demos = [f"--llm-demo={release}={program(release)}" for release in ("1.2.3", "1.3.0")]
    done = conformance(*demos)
    count = len(questions())
    assert done.stdout.count(f"passed   {count} of {count} exact") == 2, done.stdout + done.stderr
    assert "2 passed, 0 failed" in done.stdout
    assert done.returncode == 0


def test_a_program_that_is_wrong_or_dies_fails(tmp_path: Path) -> None:
    # Not in shell: a shell does not start with the thread sanitizer's library in it.
    wrong = tmp_path / "wrong"
    wrong.write_text(f"#!{sys.executable}\nprint('user: robot: Bananas.\\n\\nuser: ', end='')\n")
    dead = tmp_path / "dead"
    dead.write_text(f"#!{sys.executable}\nimport sys\nprint('no such model', file=sys.stderr)\nsys.exit(3)\n")
    for script in (wrong, dead):
        script.chmod(0o755)
    done = conformance(f"--llm-demo=1.2.3={wrong}", f"--llm-demo=1.3.0={dead}", "--questions", 1)
    assert "got      'Bananas.'" in done.stdout
    assert re.search(r"it ended with 3:\s+no such model", done.stdout)
    assert "0 passed, 2 failed" in done.stdout
    assert done.returncode == 1


def test_nothing_that_ran_is_no_success() -> None:
    done = conformance("--questions", 1)
    assert "0 passed, 0 failed, 4 not run" in done.stdout
    assert done.returncode == 1


SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
open("pids", "w").write(f"{os.getpid()} {child.pid}")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(int(sys.argv[2]))
        self.end_headers()
        self.wfile.write(b'{"choices": [{"message": {"content": "Yes."}}]}')

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CALL = """
import sys
from pathlib import Path
from tests.conformance import clients

class Fake(clients.Server):
    def lay_out(self, setup, port):
        return [sys.executable, "server.py", str(port), sys.argv[2]], setup.folder, {}

setup = clients.Setup(Path("m"), Path("t"), Path, Path(sys.argv[1]))
try:
    print(Fake("fake", "1.2.3", Path(sys.executable), clients.ask_openai).answers(setup, ["Is it?", "Is it?"]))
except clients.ClientError as error:
    print("ClientError", error)
"""


@pytest.mark.parametrize(("status", "said"), [(200, "['Yes.', 'Yes.']"), (503, "ClientError ValueError: /v1")])
def test_servers_are_ended_with_all_that_they_started(status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    call = [sys.executable, "-c", CALL, tmp_path, str(status)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert said in done.stdout, done.stderr
    for pid in (tmp_path / "pids").read_text().split():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z")


def test_what_the_page_tells_other_projects_works(program: Any, tmp_path: Path) -> None:
    """The shell lines of docs/emulator.md, in a folder with somebody's program."""
    page = (ROOT / "docs" / "emulator.md").read_text()
    section = page.split("## In another project's CI")[1].split("\n## ")[0]
    script = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    steps = script.split("# your own steps from here on\n")[1]
    assert "RKEMU_FAULT" in steps
    (tmp_path / "your_program").symlink_to(program("1.3.0"))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # A sanitizer's library is for the programs that the shell starts: the shell itself dies of the thread sanitizer's.
    preload = environment.pop("LD_PRELOAD", "")
    steps = f"export LD_PRELOAD='{preload}'\n{steps}"
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", steps], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
