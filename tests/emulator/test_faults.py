"""Faults on demand: each behaves as its table says, and its log means to rkruntime's diagnosis what it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rkruntime.diagnosis import diagnose
from rkruntime.resources import resource

NORMAL, WAITING, FINISH, ERROR = range(4)

# Fault -> class of the failure taxonomy that its log shows. Faults without a line of their own are not here.
CLASSES = {
    "alloc-12": "npu-address-space-exhausted",
    "alloc-14": "npu-address-space-exhausted",
    "alloc-24": "fd-limit",
    "alloc-38": "kernel-without-rknpu",
    "second-init": "second-init-or-crash-on-error",
    "host-memory": "host-ram-at-load",
    "no-device": "npu-device-not-reachable",
    "wrong-node": "npu-wrong-node",
    "platform-query": "platform-unsupported-or-unknown",
    "platform-name": "platform-unsupported-or-unknown",
    "platform-mismatch": "platform-unsupported-or-unknown",
    "bad-model": "model-file-invalid",
    "bad-magic": "model-runtime-version-mismatch",
    "model-too-old": "model-runtime-version-mismatch",
    "tensor-count": "model-runtime-version-mismatch",
    "assert": "model-runtime-version-mismatch",
    "context": "context-limit",
    "few-cpus": "cpu-cores-below-npu-cores",
    "old-driver": "driver-too-old-run",
    "job-timeout": "npu-job-timeout",
    "false-success": "model-runtime-version-mismatch",
}
REFUSED = [
    "alloc-12", "alloc-14", "alloc-22", "alloc-24", "alloc-38", "host-memory", "no-device", "platform-query",
    "platform-name", "platform-mismatch", "bad-model", "bad-magic", "model-too-old", "tensor-count", "context",
    "few-cpus",
]  # fmt: skip
DEADLY = {
    "wrong-node": -signal.SIGSEGV,
    "segv-init": -signal.SIGSEGV,
    "bus-init": -signal.SIGBUS,
    "ill-init": -signal.SIGILL,
    "assert": -signal.SIGABRT,
    "exit-init": 1,
    "segv-run": -signal.SIGSEGV,
    "segv-token=3": -signal.SIGSEGV,
    "exit-token=2": 1,
}

# A client in a process of its own: loads the model of argv[2] as often as argv[3] says and runs it once.
CLIENT = """
import ctypes, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import importlib.util
spec = importlib.util.spec_from_file_location("conftest", sys.argv[4])
conftest = importlib.util.module_from_spec(spec)
sys.modules["conftest"] = conftest
spec.loader.exec_module(conftest)
clients = [conftest.Client(Path(sys.argv[1]), Path(sys.argv[2]), "1.2.3") for _ in range(int(sys.argv[3]))]
print("loaded", [client.status for client in clients], flush=True)
clients[0].on_event = lambda event: print("event", event.state, event.token, flush=True) or 0
print("ran", clients[0].run([7, 8, 9]), flush=True)
"""


def run_client(library: Any, model: Path, fault: str, *, loads: int = 1, timeout: float = 60) -> Any:
    environment = os.environ | {"RKEMU_FAULT": fault}
    arguments = [library("1.2.3"), model, loads, Path(__file__).parent / "conftest.py"]
    return subprocess.run(
        [sys.executable, "-c", CLIENT, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def names() -> list[str]:
    """All faults of the C++ table."""
    return re.findall(r'^ +\{"([a-z0-9-]+)", Stage::', (resource("emulator") / "faults.cc").read_text(), re.M)


def test_there_are_more_than_20_and_the_docs_name_all() -> None:
    assert len(names()) == len(set(names())) >= 20
    page = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text()
    for name in names():
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("fault", REFUSED)
def test_a_load_that_is_refused(
    fault: str, load: Any, small: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RKEMU_FAULT", fault)
    client = load(small.path, expect=-1)
    assert not client.handle
    log = capfd.readouterr().err
    assert log.endswith("E rkllm: rkllm_init failed\n")
    if fault in CLASSES:
        assert diagnose(log).class_ == CLASSES[fault]
    monkeypatch.delenv("RKEMU_FAULT")
    assert load(small.path).answer([7, 8, 9])


def test_the_size_of_a_refused_block(load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "alloc-14=232128512")
    load(small.path, expect=-1)
    log = capfd.readouterr().err
    assert "errno: 14, errstr: Bad address" in log
    assert "failed to malloc npu memory, size: 232128512, flags: 0x2" in log


@pytest.mark.parametrize("fault", DEADLY)
def test_a_process_that_dies(fault: str, library: Any, small: Any) -> None:
    done = run_client(library, small.path, fault)
    assert done.returncode == DEADLY[fault]
    name, _, count = fault.partition("=")
    assert ("loaded" in done.stdout) == ("init" not in name and name not in ("assert", "wrong-node"))
    assert done.stdout.count("event") == (int(count) - 1 if count else 0)
    if name in CLASSES:
        assert diagnose(done.stderr + "\nSegmentation fault").class_ == CLASSES[name]


def test_the_second_handle_of_a_process_crashes(library: Any, small: Any) -> None:
    assert run_client(library, small.path, "second-init").returncode == 0
    done = run_client(library, small.path, "second-init", loads=2)
    assert done.returncode == -signal.SIGSEGV
    assert diagnose(done.stderr + "Segmentation fault").class_ == CLASSES["second-init"]


@pytest.mark.parametrize(("fault", "seen"), [("hang-init", ""), ("hang-token=2", "event 0")])
def test_a_call_that_never_returns(fault: str, seen: str, library: Any, small: Any) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as hung:
        run_client(library, small.path, fault, timeout=5)
    out = (hung.value.stdout or b"").decode()
    assert seen in out
    assert "ran" not in out


def test_success_after_a_failed_load(load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "false-success")
    client = load(small.path)
    assert diagnose(capfd.readouterr().err).class_ == CLASSES["false-success"]
    assert client.run([7, 8]) == -1
    assert client.states == [ERROR]
    assert client.destroy() == 0


@pytest.mark.parametrize("fault", ["job-timeout=3", "error-token=3"])
def test_an_error_in_the_middle(fault: str, load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", fault)
    client = load(small.path)
    assert client.run([7, 8, 9]) == -1
    assert client.states == [NORMAL, NORMAL, ERROR]
    if fault.startswith("job"):
        assert diagnose(capfd.readouterr().err).class_ == CLASSES["job-timeout"]


@pytest.mark.parametrize("by", ["RKEMU_FAULT=old-driver", "RKEMU_DRIVER=0.8.2"])
def test_an_old_driver_answers_rubbish(by: str, load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv(*by.split("="))
    client = load(small.path, max_new_tokens=30)
    assert client.run([7, 8, 9]) == 0
    assert b"".join(batch[0].text for batch in client.events) == b"!" * 30
    log = capfd.readouterr().err
    assert diagnose(log).class_ == "driver-too-old-run"
    assert ("upgrade to 0.9.7" in log) == by.startswith("RKEMU_DRIVER")


def test_lost_and_damaged_callbacks(load: Any, small: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "lost-finish")
    client = load(small.path)
    assert client.run([7, 8, 9]) == 0
    assert client.states == [NORMAL] * 8

    monkeypatch.setenv("RKEMU_FAULT", "null-text")
    client = load(small.path)
    assert client.run([7, 8, 9]) == 0
    assert {batch[0].text for batch in client.events} == {None}

    monkeypatch.setenv("RKEMU_FAULT", "lost-run")
    client = load(small.path)
    assert client.call("rkllm_run_async", [[7, 8, 9]], client.infer()) == 0
    assert client.lib.rkllm_is_running(client.handle) == 0
    assert client.events == []


def test_text_that_is_cut_inside_of_characters(load: Any, make_model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    made = make_model(tmp_path / "m.rkemu", echo=True)
    lead = 6 + "é".encode()[0]
    assert load(made.path, max_new_tokens=1).run([lead]) == 0
    monkeypatch.setenv("RKEMU_FAULT", "cut-text")
    client = load(made.path, max_new_tokens=1)
    assert client.run([lead]) == 0
    assert (client.events[0][0].state, client.events[0][0].text) == (NORMAL, "é".encode()[:1])


def test_slowness(load: Any, small: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "slow-token=5")
    client = load(small.path)
    client.run([7, 8, 9])
    assert client.last.perf.generate_time_ms >= 8 * 5


def test_several_faults_at_once(load: Any, small: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "null-text,lost-finish,slow-token=1")
    client = load(small.path)
    client.run([7, 8, 9])
    assert client.states == [NORMAL] * 8
    assert client.last.text is None


@pytest.mark.parametrize("fault", ["none", "segv", "segv-init-", ",,", "alloc-14,oops"])
def test_an_unknown_fault_is_an_error(fault: str, load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", fault)
    load(small.path, expect=-1)
    assert "there is no RKEMU_FAULT" in capfd.readouterr().err
