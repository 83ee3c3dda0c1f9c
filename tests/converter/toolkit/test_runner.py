"""Conversions with stand-ins of the toolkit: the good way, and each way that it was seen to fail."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from rkconvert.toolkit import session, target
from rkconvert.toolkit.events import Event, Heartbeat, Notice, Progress, Stage, WorkerStarted
from rkconvert.toolkit.interpreter import Toolkit
from rkconvert.toolkit.job import ToolkitJob
from rkconvert.toolkit.output import new_log
from rkconvert.toolkit.target import run_toolkit
from rkruntime.errors import CalibrationError, CheckpointError, HostError, RefusedError, RKEdgeError, ToolkitError

Job = Callable[..., ToolkitJob]
Find = Callable[..., Toolkit]
Fail = Callable[[str], None]
VERSIONS = ["1.1.4", "1.2.0", "1.2.3", "1.3.0"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_conversion(job: Job, toolkit: Find, version: str, open_descriptors: Callable[[], int]) -> None:
    before, events, asked = open_descriptors(), [], job()
    result = run_toolkit(asked, toolkit(version), events.append)
    assert open_descriptors() == before
    assert os.listdir(asked.output.parent) == ["model.rkllm"]
    assert result.file.path == asked.output
    assert (result.file.toolkit_version, result.file.container_version) == (version, 3)
    assert result.run.toolkit.version == f"{version}+standin"
    assert result.doubts == (f"the toolkit reports version {version}, but its package is {version}+standin",)
    assert set(result.run.seconds) == {"import", "load", "build", "export"}
    assert any("two ids" in text for text in result.run.warnings)
    assert "Optimizing model: 100%" in result.run.output.text()
    assert result.run.calls.steps[1]["arguments"]["quantized_dtype"] == "w8a8"
    assert [event.stage for event in events if isinstance(event, Stage)] == ["import", "load", "build", "export"]
    assert Progress("Optimizing model", 8, 8) in events
    assert Progress("Exporting model", 597, 597) in events
    started = next(event for event in events if isinstance(event, WorkerStarted))
    assert started.python == result.run.toolkit.python_version


def test_an_adapter_of_its_own(job: Job, toolkit: Find, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    result = run_toolkit(job(lora=tmp_path / "lora"), toolkit())
    assert result.lora is not None
    assert (
        sorted(os.listdir(result.file.path.parent))
        == ["model.rkllm", result.lora.name]
        == ["model.rkllm", "model_lora.rkllm"]
    )


@pytest.mark.parametrize(
    ("fault", "words"),
    [("lora:nothing", "wrote no file for the adapter"), ("lora:empty", "is empty"), ("lora:cut", "not a .rkllm file"),
     ("lora:link", "it is a link")],
)  # fmt: skip
@pytest.mark.parametrize("asked", [{"lora": "lora"}, {"algorithm": "normal_r8"}], ids=["adapter", "low rank"])
def test_an_adapter_that_is_lost(
    job: Job, toolkit: Find, fail: Fail, tmp_path: Path, asked: dict[str, str], fault: str, words: str
) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    fail(fault)
    made = job(**{name: tmp_path / value if name == "lora" else value for name, value in asked.items()})
    with pytest.raises(ToolkitError, match=words):
        run_toolkit(made, toolkit())
    assert nothing_left(made)


def test_a_file_that_nobody_may_read_is_readable_in_the_end(job: Job, toolkit: Find, fail: Fail) -> None:
    fail("write:closed")
    assert stat.S_IMODE(run_toolkit(job(), toolkit()).file.path.stat().st_mode) & 0o400


def test_what_makes_one_doubt_is_told(job: Job, toolkit: Find, fail: Fail) -> None:
    assert not any("truncated" in text for text in run_toolkit(job(file_size=4000), toolkit()).doubts)
    (job().output).unlink()
    assert any("truncated" in text for text in run_toolkit(job(file_size=8000), toolkit()).doubts)
    (job().output).unlink()
    fail("write:two")
    assert any("which is not in the bundle" in text for text in run_toolkit(job(), toolkit()).doubts)


def test_low_rank_brings_its_adapter(job: Job, toolkit: Find) -> None:
    result = run_toolkit(job(algorithm="normal_r8"), toolkit())
    assert result.lora is not None
    assert result.lora.is_file()


def test_the_suffix_that_1_3_0_appends(job: Job, toolkit: Find, fail: Fail) -> None:
    fail("write:suffix")
    assert run_toolkit(job(), toolkit("1.3.0")).file.path.name == "model.rkllm"


def nothing_left(job: ToolkitJob) -> bool:
    return os.listdir(job.output.parent) == []


FAULTS = [
    ("build:killed", HostError, "killed by signal 9, and the kernel counted no kill", None),
    ("load:segfault", ToolkitError, "exited with signal 11", None),
    ("build:exit", ToolkitError, r"exit\(3\)", None),
    ("build:raise", CheckpointError, "RuntimeError", "convert-checkpoint-unusable"),
    ("load:return", ToolkitError, "load_huggingface returned -1", None),
    ("build:return", ToolkitError, "build returned -1", None),
    ("export:return", ToolkitError, "export_rkllm returned -1", None),
    ("export:none", ToolkitError, "returned 'no code'", None),
    ("write:nothing", ToolkitError, "wrote no model file", None),
    ("write:magic", ToolkitError, "cannot be used: .* GGUF", None),
    ("write:link", ToolkitError, "it is a link or a folder", None),
    ("write:hard-link", ToolkitError, "it is a link or a folder", None),
    ("export:false", ToolkitError, "export_rkllm returned False", None),
    ("lora:unasked", ToolkitError, "no adapter was to become", None),
    ("write:short", ToolkitError, "the weights alone take 4,000", None),
    ("build:chinese", RefusedError, "目标平台不支持", "convert-dtype-unsupported"),
    ("build:cuda-memory", HostError, "CUDA out of memory", "convert-out-of-memory"),
    ("export:disk", HostError, "found a disk full", None),
    ("build:endless", ToolkitError, "build returned -1", None),
    ("load:ask", ToolkitError, "EOFError", None),
    ("load:events", ToolkitError, "does not understand", None),
    ("import:pkg_resources", HostError, "cannot be imported", "convert-environment"),
]


@pytest.mark.parametrize(("fault", "error", "words", "diagnosed"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_fault(
    job: Job, toolkit: Find, fail: Fail, fault: str, error: type[RKEdgeError], words: str, diagnosed: str | None
) -> None:
    fail(fault)
    asked = job(parameters=4000)
    with pytest.raises(error) as caught:
        run_toolkit(asked, toolkit())
    assert type(caught.value) is error
    assert re.search(words, "\n".join([caught.value.message, *caught.value.log]))
    assert nothing_left(asked)
    assert caught.value.hint
    assert "RKLLM_LOG_LEVEL" not in caught.value.hint  # which only the runtime reads
    if fault != "load:events":
        assert Path(caught.value.details["log"]).is_file()
        assert str(caught.value.details["log"]) in caught.value.message
    if diagnosed:
        assert caught.value.details["diagnosis"]["class"] == diagnosed
    fail("")
    assert run_toolkit(asked, toolkit()).file.path.is_file()


@pytest.mark.parametrize(
    ("config", "dataset", "error", "words"),
    [
        ({"architectures": ["Gemma4ForConditionalGeneration"]}, None, RefusedError, "Not support Gemma4"),
        ({"quantization_config": {"load_in_4bit": True}}, None, CheckpointError, "bitsandbytes"),
        ({"head_dim": 16}, None, RefusedError, "narrower than the 96"),
        ({}, "[{}]", CalibrationError, "'input'"),
        ({}, "no json", CalibrationError, "Expecting value"),
    ],
)
def test_what_the_toolkit_refuses(
    job: Job, model: Callable[..., Path], toolkit: Find, tmp_path: Path,
    config: dict[str, Any], dataset: str | None, error: type[RKEdgeError], words: str,
) -> None:  # fmt: skip
    asked = job()
    model(**config)
    if dataset:
        (tmp_path / "data.json").write_text(dataset)
        asked = replace(asked, calibration=tmp_path / "data.json")
    with pytest.raises(error) as caught:
        run_toolkit(asked, toolkit())
    assert type(caught.value) is error
    assert re.search(words, "\n".join([caught.value.message, *caught.value.log]))
    assert nothing_left(asked)


def test_out_of_memory_tells_the_numbers(job: Job, toolkit: Find, fail: Fail) -> None:
    fail("build:killed")
    with pytest.raises(HostError, match=r"weights alone take 10\.4 GB in float32") as caught:
        run_toolkit(job(parameters=2_600_000_000), toolkit())
    assert caught.value.details["exit_code"] == -signal.SIGKILL
    assert "swap" in caught.value.hint


def test_a_kill_by_the_kernel_is_told_from_others(
    job: Job, toolkit: Find, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail("build:killed")
    monkeypatch.setattr(session, "out_of_memory_kills", Mock(side_effect=[3, 4]))
    with pytest.raises(HostError, match="killed by the kernel") as caught:
        run_toolkit(job(parameters=4000), toolkit())
    assert caught.value.details["diagnosis"]["class"] == "convert-out-of-memory"
    with pytest.raises(HostError, match="probably by the kernel"):
        monkeypatch.setattr(session, "out_of_memory_kills", lambda: 3)
        run_toolkit(job(parameters=10**13), toolkit())


# 1.1.x does not have the option, and 1.3.0 was reported to load float32 on the CPU regardless.
LOADED = [
    ("1.1.4", "bfloat16", "cpu", "10.4 GB in float32", False),
    ("1.2.3", "float32", "cpu", "10.4 GB in float32", True),
    ("1.2.3", "bfloat16", "cpu", "5.2 GB in bfloat16", False),
    ("1.3.0", "float32", "cpu", "10.4 GB in float32", False),
    ("1.3.0", "float16", "cpu", "10.4 GB in float32", False),
    ("1.3.0", "float32", "cuda", "10.4 GB in float32", True),
    ("1.3.0", "bfloat16", "cuda", "5.2 GB in bfloat16", False),
]


@pytest.mark.parametrize(("version", "asked", "device", "held", "helps"), LOADED)
def test_a_load_type_is_advised_only_where_it_saves_memory(
    job: Job, toolkit: Find, fail: Fail, version: str, asked: str, device: str, held: str, helps: bool
) -> None:
    fail("load:killed")
    options = job(parameters=2_600_000_000, toolkit_load_dtype=asked, toolkit_device=device)
    with pytest.raises(HostError, match=re.escape(held)) as caught:
        run_toolkit(options, toolkit(version))
    assert ("bfloat16" in caught.value.hint) is helps


def test_parameters_found_before_a_failure_stay_beside_the_log(job: Job, toolkit: Find, fail: Fail) -> None:
    fail("export:return")
    asked = {"platform": "rk3576", "dtype": "w4a16", "algorithm": "gdq", "toolkit_device": "cuda", "npu_cores": 2}
    with pytest.raises(ToolkitError) as caught:
        run_toolkit(job(**asked), toolkit())
    assert Path(str(caught.value.details["log"])).with_suffix(".qparams").read_text() == "scales"


def test_a_method_that_lacks_an_argument_is_told_before_the_work(job: Job, toolkit: Find) -> None:
    found = toolkit("1.1.4")
    wrong = replace(found, release=replace(toolkit("1.2.3").release))
    with pytest.raises(HostError, match=r"unexpected keyword argument 'dtype'"):
        run_toolkit(job(), wrong)


def test_an_interpreter_that_went_away(job: Job, toolkit: Find, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be started: No such file"):
        run_toolkit(job(), replace(toolkit(), python=tmp_path / "python"))


def test_no_sign_of_life(job: Job, toolkit: Find, fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkconvert.toolkit.watchdog._LOOK_EVERY", 0.2)
    fail("build:hang")
    asked = job()
    with pytest.raises(ToolkitError, match="no activity for 2 s while it quantized"):
        run_toolkit(replace(asked, toolkit_patience=2), toolkit())
    assert nothing_left(asked)


def test_busy_and_silent_is_alive(job: Job, toolkit: Find, fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkconvert.toolkit.watchdog._LOOK_EVERY", 0.2)
    fail("build:spin")
    assert run_toolkit(job(toolkit_patience=1.5), toolkit()).file.path.is_file()


def child_of(events: list[Event]) -> int:
    return next(int(event.text.split()[1]) for event in events if isinstance(event, Notice) and "child" in event.text)


def test_what_it_started_ends_with_it(job: Job, toolkit: Find, fail: Fail, is_alive: Callable[[int], bool]) -> None:
    fail("build:child")
    events: list[Event] = []
    assert run_toolkit(job(), toolkit(), events.append).file.path.is_file()
    assert not is_alive(child_of(events))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_callback_that_raises_ends_it(
    job: Job, toolkit: Find, fail: Fail, is_alive: Callable[[int], bool], error: type[BaseException],
    open_descriptors: Callable[[], int],
) -> None:  # fmt: skip
    fail("build:child-hang")
    events: list[Event] = []
    before, found, asked = open_descriptors(), toolkit(), job()

    def watch(event: Event) -> None:
        events.append(event)
        if isinstance(event, Heartbeat) and any(isinstance(seen, Notice) and "child" in seen.text for seen in events):
            raise error

    with pytest.raises(error):
        run_toolkit(asked, found, watch)
    started = next(event for event in events if isinstance(event, WorkerStarted))
    assert not is_alive(started.pid)
    assert not is_alive(child_of(events))
    assert nothing_left(asked)
    assert open_descriptors() == before


def test_heartbeats_tell_memory(job: Job, toolkit: Find, fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkconvert.toolkit.watchdog._LOOK_EVERY", 0.2)
    fail("build:spin")
    events: list[Event] = []
    result = run_toolkit(job(), toolkit(), events.append)
    beats = [event for event in events if isinstance(event, Heartbeat)]
    assert beats
    assert beats[-1].peak_memory == result.run.peak_memory > 1 << 20
    assert beats == sorted(beats, key=lambda beat: beat.seconds)


def test_it_ends_when_this_process_is_killed(
    job: Job, environments: Callable[[str], Path], fail: Fail, is_alive: Callable[[int], bool], tmp_path: Path
) -> None:
    fail("build:child-hang")
    asked = job()
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        from rkconvert.toolkit.interpreter import inspect_toolkit
        from rkconvert.toolkit.job import ToolkitJob
        from rkconvert.toolkit.target import run_toolkit
        toolkit = inspect_toolkit(Path({str(environments("1.2.3"))!r}), "the test")
        job = ToolkitJob(
            model=Path({str(asked.model)!r}), output=Path({str(asked.output)!r}),
            platform="rk3588", dtype="w8a8", npu_cores=3, max_context=4096,
        )
        run_toolkit(job, toolkit, lambda event: print(event, flush=True))
        """
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = child = 0
        for line in process.stdout:
            if line.startswith("WorkerStarted"):
                worker = int(line.rpartition("pid=")[2].rstrip(")\n"))
            if "child" in line:
                child = int(line.rpartition("child ")[2].rstrip("')\n"))
                break
        assert is_alive(worker)
        assert is_alive(child)
        process.kill()
    deadline = time.monotonic() + 60
    while is_alive(worker) or is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_secrets_stay_here(job: Job, toolkit: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    from rkconvert.toolkit.interpreter import clean_environment

    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in clean_environment(toolkit().python).values()


def test_old_logs_go(job: Job, toolkit: Find, home: Path) -> None:
    logs = home / "xdg_cache_home" / "rkedge" / "logs"
    logs.mkdir(parents=True)
    for number in range(20):
        (logs / f"toolkit-20240101-0000{number:02}-x.log").touch()
    result = run_toolkit(job(), toolkit())
    assert result.run.output.path is not None
    assert result.run.output.path.parent == logs
    assert len(list(logs.iterdir())) == 10


def test_a_log_in_use_stays(job: Job, toolkit: Find) -> None:
    def start_others(event: Event) -> None:
        if isinstance(event, Stage) and event.stage == "build":
            for _ in range(30):
                log = new_log()
                assert log is not None
                log.close()

    result = run_toolkit(job(), toolkit(), start_others)
    assert result.run.output.path is not None
    assert "Optimizing model" in result.run.output.path.read_text()


class FullDisk(FileIO):
    """A file on a disk with room for a few bytes."""

    def write(self, data: Any) -> int:
        if self.tell() >= 200:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[: 200 - self.tell()])


@pytest.mark.parametrize("disk", ["full", "absent"])
@pytest.mark.parametrize("ending", ["", "build:return", "build:chinese"])
def test_a_log_that_cannot_be_written(
    job: Job, toolkit: Find, fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, ending: str
) -> None:
    log = tmp_path / "short.log"
    monkeypatch.setattr(target, "new_log", lambda: FullDisk(log, "w") if disk == "full" else None)
    fail(ending)
    if not ending:
        result = run_toolkit(job(), toolkit())
        assert result.file.path.is_file()
        assert result.run.output.take().endswith(
            b"Model has been saved to " + bytes(result.run.scratch) + b"/model.rkllm!"
        )
        assert not log.exists()
        return
    with pytest.raises(RKEdgeError) as caught:
        run_toolkit(job(), toolkit())
    assert "disk is full" not in caught.value.message
    assert ("as far as it could be written (No space left" if disk == "full" else "no log") in caught.value.message
    # What the log would have been read for is still known.
    assert isinstance(caught.value, RefusedError if "chinese" in ending else ToolkitError)


def test_no_folder_takes_a_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert new_log() is None


@pytest.mark.parametrize(("full", "words"), [("out", "output folder"), ("tmp", "temporary folder")])
def test_the_full_disk_is_named(
    job: Job, toolkit: Find, fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str, words: str
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=0 if tmp_path / full in (path, *path.parents) else 9 << 30),
    )
    fail("export:disk")
    with pytest.raises(
        HostError, match=f"the disk of the {words} is full; free are .*0.00 GB in the {words}"
    ) as caught:
        run_toolkit(job(), toolkit())
    assert words in caught.value.hint
