"""Faults on demand: each behaves as its table says, and its log means to rkruntime's diagnosis what the table says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rkboard.commands.emulator import run as command
from rkboard.emulator import faults
from rkruntime.checks.diagnosis import UNEXPLAINED, diagnose
from rkruntime.checks.failures import table

NORMAL, WAITING, FINISH, ERROR = range(4)
FIRST_BYTE = 6  # of the tokens of these models
ALL = {fault.name: fault for fault in faults.faults()}


@dataclass(frozen=True)
class Outcome:
    """What a client sees. `ends` is a signal's name or an exit status; `states` are those of the callbacks."""

    ends: str | int = 0
    init: int | None = 0
    run: int | None = 0
    states: str = "NNNF"


ISSUES = re.compile(r"((?:[\w-]+/)?[\w-]+ \d+(, \d+)*|strings)(, strings)?(: .+)?")


@pytest.mark.parametrize("row", [*faults.faults(), *faults.guesses()], ids=lambda row: row.name)
def test_a_source_is_an_address_or_says_that_there_is_none(row: faults.Fault | faults.Guess) -> None:
    named = ISSUES.fullmatch(row.source) or "https://" in row.source or "no address is known" in row.source
    assert named or not row.source


REFUSED = Outcome(init=-1, run=None, states="")
NO_RUN = Outcome(run=-1, states="E")


def dies(how: str | int, init: int | None = None, states: str = "") -> Outcome:
    return Outcome(how, init, None, states)


EXPECTED = {
    **dict.fromkeys(["alloc-12", "alloc-14", "alloc-22", "alloc-24", "alloc-38"], REFUSED),
    **dict.fromkeys(["old-driver-memory", "domain-broken", "host-memory", "no-device"], REFUSED),
    **dict.fromkeys(["platform-query", "platform-name", "platform-mismatch", "few-cpus", "context"], REFUSED),
    **dict.fromkeys(["bad-model", "bad-magic", "model-too-old", "model-too-new", "tensor-count"], REFUSED),
    **dict.fromkeys(["no-tokenizer", "long-prompt", "false-success", "silent-failure"], NO_RUN),
    **dict.fromkeys(["job-timeout", "error-token"], NO_RUN),
    **dict.fromkeys(["leak", "old-driver", "unknown-shape", "no-prompt-cache", "no-template", "wrong-eos"], Outcome()),
    **dict.fromkeys(["slow-init", "slow-token", "null-text", "cut-text", "padding"], Outcome()),
    **dict.fromkeys(["noise", "noise-init"], Outcome()),
    "lost-finish": Outcome(states="NNN"),
    "lost-run": Outcome(),
    "oom-killed": dies("SIGKILL"),
    "wrong-node": dies("SIGSEGV"),
    "segv-init": dies("SIGSEGV"),
    "bus-init": dies("SIGBUS"),
    "ill-init": dies("SIGILL"),
    "assert": dies("SIGABRT"),
    "exit-init": dies(1),
    "second-init": dies("SIGSEGV", 0),
    "segv-run": dies("SIGSEGV", 0),
    "segv-token": dies("SIGSEGV", 0),
    "assert-token": dies("SIGABRT", 0),
    "exit-token": dies(1, 0),
    "hang-init": dies("hangs"),
    "hang-token": dies("hangs", 0),
}

# A client in a process of its own, which talks as the vendor's demo does and writes down what it sees.
CLIENT = """
import ctypes, sys
from pathlib import Path
from rkruntime.library.binding import Library, LoadedModel
from rkruntime.errors import LoadError, RunError
library, model, seen = Library(Path(sys.argv[1]), "1.2.3"), sys.argv[2], open(sys.argv[3], "w", buffering=1)
params = {"model_path": model, "max_context_len": 64, "max_new_tokens": 3, "top_k": 1}

def on_result(results, state):
    print("state", "NWFE"[state], file=seen)
    try:
        print((results[0].text or b"").decode(), end="", flush=True)
    except UnicodeDecodeError as error:
        print(error, flush=True)
    return 0

models = []
for _ in range(int(sys.argv[4])):
    try:
        models.append(LoadedModel(library, params, on_result))
        print("rkllm init success", flush=True)
        print("init 0", file=seen)
    except LoadError:
        print("rkllm init failed", flush=True)
        sys.exit(print("init -1", file=seen))
cache = library.abi.structs["RKLLMPromptCacheParam"](1, sys.argv[5].encode())
ids = (ctypes.c_int32 * 1)(int(sys.argv[6]))
prompt = {"input_type": 1, "token_input": {"input_ids": ids, "n_tokens": 1}}
print("robot:", end="")
try:
    models[0].run(prompt, {"prompt_cache_params": ctypes.pointer(cache)})
    print("run 0", file=seen)
except RunError:
    print("run -1", file=seen)
"""


def observe(library: Path, model: Path, fault: str, folder: Path) -> tuple[Outcome, str]:
    """What a client sees, and all that it and the kernel log say."""
    seen, kernel = folder / "seen", folder / "kernel.log"
    cache = folder / "prompt_cache.bin"
    environment = os.environ | {"RKEMU_FAULT": fault, "RKEMU_KERNEL_LOG": str(kernel), "RKEMU_JOB_LIMIT_MS": "50"}
    loads = 2 if fault == "second-init" else 1
    letter = FIRST_BYTE + ("é".encode()[0] if fault == "cut-text" else ord("c"))
    arguments = [library, model, seen, loads, cache, letter]
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        log = client.communicate(timeout=4 if fault.startswith("hang") else 60)[0]
    except subprocess.TimeoutExpired:
        client.kill()
        log = client.communicate()[0]
        ends: str | int = "hangs"
    else:
        ends = client.returncode if client.returncode >= 0 else signal.Signals(-client.returncode).name
    facts = [line.split() for line in seen.read_text().splitlines()] if seen.exists() else []
    values = {key: int(value) for key, value in facts if key != "state"}
    states = "".join(value for key, value in facts if key == "state")
    if kernel.exists():
        log = kernel.read_text() + log
    return Outcome(ends, values.get("init"), values.get("run"), states), log


@pytest.mark.parametrize("name", EXPECTED)
def test_each_fault_behaves_and_is_explained(name: str, library: Any, talker: Any, tmp_path: Path) -> None:
    outcome, log = observe(library("1.2.3"), talker, name, tmp_path)
    assert outcome == EXPECTED[name], log
    ends = outcome.ends if isinstance(outcome.ends, str) and outcome.ends.startswith("SIG") else None
    assert diagnose(log, context={"signal": ends}).class_ == (ALL[name].class_ or UNEXPLAINED), log
    if outcome.run == 0:
        assert (tmp_path / "prompt_cache.bin").exists() == (name != "no-prompt-cache")


@pytest.fixture(scope="module")
def talker(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says the last token of its prompt over and over."""
    made = make_model(tmp_path_factory.mktemp("talker") / "m.rkemu", echo=True)
    path: Path = made.path
    return path


def test_the_table_is_whole() -> None:
    assert set(ALL) == set(EXPECTED)
    assert len({fault.class_ for fault in ALL.values()} - {""}) >= 20
    assert {fault.class_ for fault in ALL.values()} - {""} <= set(table().classes)


def test_the_page_has_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text()
    assert page == faults.page(page), "run python -m rkboard.emulator.faults docs/emulator.md"
    for name in (*ALL, *(guess.name for guess in faults.guesses())):
        assert page.count(f"\n| `{name}` | ") == 1


def test_the_command_lists_them_too() -> None:
    shown = CliRunner().invoke(command, ["info", "--faults"])
    assert shown.exit_code == 0
    assert [line.split()[0].partition("=")[0] for line in shown.output.splitlines()] == list(ALL)
    rows = json.loads(CliRunner().invoke(command, ["info", "--faults", "--json"]).output)
    assert [row["name"] for row in rows] == list(ALL)
    assert rows[0]["class"] == "npu-address-space-exhausted"


@pytest.mark.parametrize("mark", ["=", ":"])
def test_the_size_of_a_refused_block(mark: str, load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", f"alloc-14{mark}232128512")
    load(small.path, expect=-1)
    log = capfd.readouterr().err
    assert "errno: 14, errstr: Bad address" in log
    assert "failed to malloc npu memory, size: 232128512, flags: 0x2" in log
    assert log.endswith("E rkllm: rkllm_init failed\n")
    monkeypatch.delenv("RKEMU_FAULT")
    assert load(small.path).answer([7, 8, 9])


@pytest.mark.parametrize("fault", ["segv-token=3", "exit-token=3", "assert-token=3"])
def test_the_token_before_which_it_strikes(fault: str, library: Any, small: Any, tmp_path: Path) -> None:
    outcome, _ = observe(library("1.2.3"), small.path, fault, tmp_path)
    assert outcome.states == "NN"


@pytest.mark.parametrize(
    "fault", ["segv-token", "exit-token", "assert-token", "hang-token", "error-token", "job-timeout"]
)
def test_a_token_that_never_comes_is_refused(fault: str, load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    for value in ("0", "-1", "", "x", "1x", "99999999999999999999"):
        monkeypatch.setenv("RKEMU_FAULT", f"{fault}={value}")
        load(small.path, expect=-1)
        assert f"RKEMU_FAULT {fault} takes a number from 1" in capfd.readouterr().err
    monkeypatch.setenv("RKEMU_FAULT", "slow-token=0")
    assert load(small.path).answer([7, 8, 9])


def test_the_second_handle_alone_is_refused(library: Any, small: Any, monkeypatch: Any, load: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "second-init")
    assert load(small.path).answer([7, 8, 9])


def test_success_after_a_failed_load(load: Any, small: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "false-success")
    client = load(small.path)
    assert client.run([7, 8]) == -1
    assert client.states == [ERROR]
    assert client.destroy() == 0


def test_a_lost_job_takes_the_handle_with_it(load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "job-timeout=3")
    monkeypatch.setenv("RKEMU_JOB_LIMIT_MS", "1")
    client = load(small.path)
    assert client.run([7, 8, 9]) == -1
    assert client.states == [NORMAL, NORMAL, ERROR]
    assert client.run([7, 8, 9]) == -1
    assert client.states == [ERROR]
    assert capfd.readouterr().err.count("RKNPU: soft reset") == 2, "without a kernel log they stand on stderr"
    assert client.destroy() == 0
    monkeypatch.delenv("RKEMU_FAULT")
    assert load(small.path).answer([7, 8, 9])


@pytest.mark.parametrize("by", ["RKEMU_FAULT=old-driver", "RKEMU_DRIVER=0.8.2"])
def test_an_old_driver_answers_rubbish(by: str, load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv(*by.split("="))
    client = load(small.path, max_new_tokens=30)
    assert client.run([7, 8, 9]) == 0
    assert b"".join(batch[0].text for batch in client.events) == b"!" * 30
    log = capfd.readouterr().err
    assert diagnose(log).class_ == "driver-too-old-run"
    assert "upgrade to 0.9.7" in log
    assert log.count("matmul(w8a8) run failed") == 30


def test_lost_and_damaged_callbacks(load: Any, small: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "null-text")
    client = load(small.path)
    assert client.run([7, 8, 9]) == 0
    assert {batch[0].text for batch in client.events} == {None}

    monkeypatch.setenv("RKEMU_FAULT", "padding")
    client = load(small.path)
    assert client.run([7, 8, 9]) == 0
    assert {batch[0].text for batch in client.events[:-1]} == {b"[PAD151935]"}

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


def test_answers_that_do_not_end(load: Any, make_model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    made = make_model(tmp_path / "m.rkemu", echo=True)
    eos = 1
    assert load(made.path).answer([eos]) == []
    monkeypatch.setenv("RKEMU_FAULT", "wrong-eos")
    assert load(made.path).answer([eos]) == [eos] * 8


def test_a_template_that_is_not_used(load: Any, make_model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    made = make_model(tmp_path / "m.rkemu", meta={"rkllm.chat_template.prefix": "abcdef"})
    client = load(made.path)
    client.run("x")
    wrapped = client.last.perf.prefill_tokens
    monkeypatch.setenv("RKEMU_FAULT", "no-template")
    client = load(made.path)
    client.run("x")
    assert client.last.perf.prefill_tokens == wrapped - len("abcdef")


def test_a_leak_ends_with_the_handle(load: Any, small: Any, monkeypatch: Any) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    monkeypatch.setenv("RKEMU_FAULT", "leak=64")
    client = load(small.path)
    before = resident()
    for _ in range(3):
        client.run([7, 8, 9])
    assert resident() - before > 150 << 20
    client.destroy()
    client.handle = None
    assert resident() - before < 64 << 20


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


@pytest.mark.parametrize("fault", ["alloc-14=", "alloc-14=x", "alloc-14=-1", "segv-init=1", "alloc-14=1e9"])
def test_a_value_that_is_no_number_is_an_error(fault: str, load: Any, small: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("RKEMU_FAULT", fault)
    load(small.path, expect=-1)
    assert "takes " in capfd.readouterr().err
