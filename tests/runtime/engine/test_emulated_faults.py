"""Every fault that the emulator knows, in the texts that people reported: the right error, of the right class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from rkboard.emulator.faults import faults
from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Request
from rkruntime.errors import LoadError, RunError, WorkerCrashedError, WorkerHungError

REQUEST = Request([2, 106, 451, 364, 472, 474], max_new_tokens=6)


class Expected(NamedTuple):
    error: type[Exception] | None  # None: it is no failure for us
    diagnosis: str | None = None  # None: the log says nothing that tells the class
    stage: str = "load"
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


HANG = {"load_timeout": 1.0, "token_timeout": 1.0}
FAULTS = {
    "alloc-12": Expected(LoadError, "npu-address-space-exhausted"),
    "alloc-14": Expected(LoadError, "npu-address-space-exhausted"),
    "alloc-22": Expected(LoadError, "npu-no-iommu"),
    "alloc-24": Expected(LoadError, "fd-limit"),
    "alloc-38": Expected(LoadError, "kernel-without-rknpu"),
    "domain-broken": Expected(LoadError, "npu-domain-state-broken"),
    "old-driver-memory": Expected(LoadError, "npu-memory-old-driver"),
    "second-init": Expected(None),  # each model has a process of its own
    "host-memory": Expected(LoadError, "host-ram-at-load"),
    "oom-killed": Expected(WorkerCrashedError, "host-ram-at-load"),
    "leak": Expected(None),
    "no-device": Expected(LoadError, "npu-device-not-reachable"),
    "wrong-node": Expected(WorkerCrashedError, "npu-wrong-node"),
    "platform-query": Expected(LoadError, "platform-unsupported-or-unknown"),
    "platform-name": Expected(LoadError, "platform-unsupported-or-unknown"),
    "platform-mismatch": Expected(LoadError, "platform-unsupported-or-unknown"),
    "bad-model": Expected(LoadError, "model-file-invalid"),
    "bad-magic": Expected(LoadError, "model-runtime-version-mismatch"),
    "model-too-old": Expected(LoadError, "model-runtime-version-mismatch"),
    "model-too-new": Expected(LoadError, "model-runtime-version-mismatch"),
    "no-tokenizer": Expected(RunError, "model-file-invalid", "run"),
    "wrong-eos": Expected(None),  # our stop tokens end the answer
    "tensor-count": Expected(LoadError, "model-runtime-version-mismatch"),
    "assert": Expected(WorkerCrashedError, "model-runtime-version-mismatch"),
    "context": Expected(LoadError, "context-limit"),
    "long-prompt": Expected(RunError, "context-limit", "run"),
    "unknown-shape": Expected(RunError, "context-limit", "run"),
    "no-prompt-cache": Expected(None),  # nothing is saved here
    "no-template": Expected(None),  # the template is ours
    "few-cpus": Expected(LoadError, "cpu-cores-below-npu-cores"),
    "false-success": Expected(LoadError, "model-runtime-version-mismatch"),
    "silent-failure": Expected(LoadError),  # and no line says why
    "segv-init": Expected(WorkerCrashedError),
    "bus-init": Expected(WorkerCrashedError, "model-file-invalid"),
    "ill-init": Expected(WorkerCrashedError, "api-struct-or-library-mismatch"),
    "exit-init": Expected(WorkerCrashedError),
    "hang-init": Expected(WorkerHungError, options=HANG),
    "slow-init": Expected(None),
    "old-driver": Expected(RunError, "driver-too-old-run", "run"),
    "job-timeout": Expected(RunError, "npu-job-timeout", "run"),
    "error-token": Expected(RunError, None, "run"),
    "segv-run": Expected(WorkerCrashedError, None, "run"),
    "segv-token": Expected(WorkerCrashedError, None, "run"),
    "assert-token": Expected(WorkerCrashedError, "model-runtime-version-mismatch", "run"),
    "exit-token": Expected(WorkerCrashedError, None, "run"),
    "hang-token": Expected(WorkerHungError, None, "run", HANG),
    "slow-token": Expected(None),
    "lost-run": Expected(WorkerHungError, None, "run", {**HANG, "asynchronous": True}),
    "lost-finish": Expected(None),
    "null-text": Expected(None),
    "cut-text": Expected(None),
    "padding": Expected(None),
    "noise-init": Expected(None),
    "noise": Expected(None),
}


def test_the_table_is_whole() -> None:
    assert {fault.name for fault in faults()} == set(FAULTS)


@pytest.fixture(params=["1.2.3", "1.3.0"])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault(options: Callable[..., LoadOptions], release: str, fault: str) -> None:
    expected = FAULTS[fault]
    faulty = options(release, environment={"RKEMU_FAULT": fault}, **expected.options)
    if expected.error is None:
        with Engine.load(faulty) as engine, Engine.load(faulty):
            assert len(list(engine.generate(REQUEST))) == 7
        return
    if expected.stage == "load":
        with pytest.raises(expected.error) as caught:
            Engine.load(faulty)
    else:
        with Engine.load(faulty) as engine, pytest.raises(expected.error) as caught:
            list(engine.generate(REQUEST))
    details = caught.value.details  # type: ignore[attr-defined]
    assert details["log"]
    if expected.diagnosis:
        assert details["diagnosis"]["class"] == expected.diagnosis
        assert details["diagnosis"]["next_steps"]
    else:
        assert details["diagnosis"]["confidence"] in ("none", "low", "medium")
    with Engine.load(options(release)) as engine:  # and the next load works
        assert len(list(engine.generate(REQUEST))) == 7


def test_a_lost_finish_of_an_asynchronous_run(options: Callable[..., LoadOptions], release: str) -> None:
    faulty = options(release, environment={"RKEMU_FAULT": "lost-finish"}, asynchronous=True, **HANG)
    with Engine.load(faulty) as engine, pytest.raises(WorkerHungError):
        list(engine.generate(REQUEST))


def test_old_drivers_are_noticed_at_once(options: Callable[..., LoadOptions], release: str) -> None:
    """An answer of exclamation marks is no answer; the model stays loaded."""
    with Engine.load(options(release, environment={"RKEMU_FAULT": "old-driver"})) as engine:
        for _ in range(2):
            with pytest.raises(RunError, match="the runtime logged: E rkllm: matmul") as caught:
                list(engine.generate(Request(REQUEST.tokens)))
            assert caught.value.details["diagnosis"]["class"] == "driver-too-old-run"
