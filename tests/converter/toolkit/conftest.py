"""Environments with stand-ins of the toolkit, one per generation, each under another Python where there is one."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from rkconvert.toolkit.interpreter import Toolkit, inspect_toolkit
from rkconvert.toolkit.job import ToolkitJob

STANDINS = Path(__file__).parent / "standins"
# The stand-in's folder, and the Python that the vendor had a wheel for at that time.
GENERATIONS = {
    "1.1.4": ("toolkit-1.1", "3.8"),
    "1.2.0": ("toolkit-1.2.0", "3.9"),
    "1.2.3": ("toolkit-1.2", "3.12"),
    "1.3.0": ("toolkit-1.3", "3.11"),
}


def python_of(release: str) -> str:
    """An interpreter of a release from PATH or pyenv that works; else the one that runs the tests."""
    found = [shutil.which(f"python{release}"), *Path.home().glob(f".pyenv/versions/{release}.*/bin/python")]
    for path in filter(None, found):
        if subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return str(path)
    return sys.executable


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a virtual environment that has the stand-in of a release; made when it is first asked for."""
    made: dict[str, Path] = {}

    def environment(version: str) -> Path:
        if version not in made:
            folder, release = GENERATIONS[version]
            path = tmp_path_factory.mktemp(folder) / "env"
            subprocess.run([python_of(release), "-m", "venv", "--without-pip", path], check=True)
            packages = next(path.glob("lib/python*/site-packages"))
            (packages / "standin.pth").write_text(f"{STANDINS / 'common'}\n{STANDINS / folder}\n")
            made[version] = path
        return made[version]

    return environment


@pytest.fixture
def toolkit(environments: Callable[[str], Path]) -> Callable[..., Toolkit]:
    """The stand-in of a release as RKEdge finds it."""
    return lambda version="1.2.3": inspect_toolkit(environments(version), "the test")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings, caches and environments of nobody."""
    for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.delenv("RKEDGE_TOOLKIT_PYTHON", raising=False)
    return tmp_path


CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 256,
    "head_dim": 64,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "standin_weights": 4096,
}


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A folder that looks like a checkpoint; `model(key=value)` changes its config.json."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        save_file({"model.norm.weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def job(tmp_path: Path, model: Callable[..., Path]) -> Callable[..., ToolkitJob]:
    """A job that the stand-ins do; `job(field=value)` changes it."""
    out = tmp_path / "out"
    out.mkdir()
    usual = {"platform": "rk3588", "dtype": "w8a8", "npu_cores": 3, "max_context": 4096}
    return lambda **fields: ToolkitJob(**{"model": model(), "output": out / "model.rkllm", **usual, **fields})


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the stand-in fail: `fail("build:killed")`."""
    return lambda what: monkeypatch.setenv("RKLLM_STANDIN_FAULT", what)


class Oracle(socketserver.StreamRequestHandler):
    """Computes what the stand-in's `get_logits` returns, with transformers and peft."""

    def handle(self) -> None:
        asked = json.loads(self.rfile.readline())
        model: Any = AutoModelForCausalLM.from_pretrained(
            asked["folder"], dtype=torch.float32, attn_implementation="eager"
        )
        if asked["head"] == "embedding":
            model.lm_head.weight = model.model.embed_tokens.weight
        if asked["adapter"]:
            model = PeftModel.from_pretrained(model, asked["adapter"])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([asked["ids"]])).logits[0]
        self.wfile.write(logits.float().numpy().tobytes())


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the stand-in answer `get_logits` with what transformers computes."""
    with (
        tempfile.TemporaryDirectory(prefix="oracle-") as folder,
        socketserver.ThreadingUnixStreamServer(f"{folder}/socket", Oracle) as server,
    ):
        monkeypatch.setenv("RKLLM_STANDIN_ORACLE", f"{folder}/socket")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield
        server.shutdown()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def is_alive() -> Callable[[int], bool]:
    return alive


@pytest.fixture
def open_descriptors() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))
