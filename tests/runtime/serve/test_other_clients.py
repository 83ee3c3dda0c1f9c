"""Clients of others that `make test` has no room for, each in an environment of its own: everyday calls, and refusals.

`clients/` has a program for each, which prints what came of its calls. test_clients.py has the Python packages of
openai and ollama.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.test_newcomer import has_an_index

from rkboard.emulator import build as emulator
from rkconvert.demo import questions

QA = {row.question: row.answer for row in questions()}
ANSWER = QA["What is the RK3588?"]
HERE = Path(__file__).parent / "clients"
CLIENTS: Mapping[str, Mapping[str, list[str]]] = yaml.safe_load((HERE / "clients.yaml").read_text())
NAMES = [(kind, name) for kind, clients in CLIENTS.items() for name in clients]
# What comes of a call, by the first word of its name in the programs.
WORKS = {
    **dict.fromkeys(("chat", "stream", "complete", "helper"), ANSWER),
    "batch": [ANSWER, ANSWER],
    "goes": QA["Does it work?"],
    "embed": 128,
    "models": 1,
    "instructions": True,
}
# The sentence that a person reads if the call is refused.
REFUSED = {
    "long": "is longer than the model's context length of 4,096 tokens",
    "tools": "his model cannot call tools. Leave",
    "image": "This model reads text only. Leave images",
    "format": "RKLLM cannot hold an answer to a format. Leave",
    "responses": "Let the client use chat completions (/v1/chat/completions).",
    "pull": "This daemon serves one model",
    "validated": "Available local models: base",
}
# What a client calls a full context, so that programs can shorten it.
FULL = {
    ("python", "litellm", "long openai/any"): "ContextWindowExceededError",
    ("python", "langchain", "long openai"): "OpenAIContextOverflowError",
}


def environment(kind: str, name: str) -> Path:
    """A folder with the client's packages, made once for each set of them."""
    packages = CLIENTS[kind][name]
    mark = hashlib.sha256(repr((packages, sys.version_info[:2])).encode()).hexdigest()[:12]
    folder = emulator.cache_folder().parent / "tests" / f"{kind}-{name}-{mark}"
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "python":
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-compile", *packages]
    else:
        folder.mkdir(parents=True)
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0 and not has_an_index():
        pytest.skip("there is no network")
    assert made.returncode == 0, made.stderr[-2000:]
    (folder / "complete").touch()
    return folder


def run(kind: str, name: str, url: str, home: Path) -> dict[str, Any]:
    """What the client's program saw."""
    folder = environment(kind, name)
    if kind == "python":
        command = [str(folder / "bin/python"), str(HERE / f"py_{name}_client.py")]
    else:
        for program in ("harness.mjs", f"js_{name}_client.mjs"):  # packages are looked for beside it
            shutil.copy(HERE / program, folder)
        command = ["node", str(folder / f"js_{name}_client.mjs")]
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "URL": url,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("kind", "name"), NAMES, ids=["-".join(each) for each in NAMES])
def test_a_client(daemon: Any, kind: str, name: str, tmp_path: Path) -> None:
    if kind == "npm" and not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("npm is not installed")
    seen = run(kind, name, daemon.url, tmp_path)
    assert len(seen) >= 2, seen
    for call, came in seen.items():
        word = call.split()[0]
        if word in WORKS:
            assert came == WORKS[word], call
        elif word in REFUSED:
            assert REFUSED[word] in came["error"], call
            assert FULL.get((kind, name, call), "") in came["kind"], call
        else:
            assert name == "aider", call
    if name == "aider":  # whose own prompts the demo model cannot follow
        assert "received." in seen["aider answers"]
        assert "hit a token limit" in seen["aider says that it is long"]


def test_the_page_names_what_was_tried() -> None:
    page = (Path(__file__).parents[3] / "docs" / "clients.md").read_text()
    for kind, name in NAMES:
        for package in CLIENTS[kind][name][:2]:
            title, _, release = package.replace("==", "@").rpartition("@")
            assert f"{title.partition('[')[0]} {release}" in page, package


def test_every_client_has_a_program() -> None:
    programs = {f"py_{name}_client.py" for name in CLIENTS["python"]} | {
        f"js_{name}_client.mjs" for name in CLIENTS["npm"]
    }
    assert {path.name for path in HERE.glob("*_client.*")} == programs
