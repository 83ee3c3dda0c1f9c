"""The command with the emulator, what stands beside its figures, and the file that `rkedge compat` takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.clocks.chip import CPU, DMC, IDLE, NPU, running, wait_until
from tests.doctor.sysroots import plant
from tests.forced import needs_sshd

from rkboard.bench.expected import expected_of
from rkboard.bench.remote import Place
from rkboard.bench.result import ClockFacts, Line, Result
from rkboard.bench.table import markdown
from rkboard.bench.watch import Watch
from rkboard.bench.workload import Row
from rkboard.commands import bench
from rkboard.doctor.visit import glance
from rkconvert.compat.cells import Level
from rkconvert.compat.results import Results, read_result
from rkconvert.demo import checkpoint
from rkconvert.plan.planner import PlanRequest, make_plan
from rkconvert.plan.report import as_dict
from rkruntime import cli
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import ServiceError, UsageError
from rkruntime.evidence import ResultBoard
from rkruntime.program import own_command

QUICK = ["-p", "16", "-n", "8", "-d", "0,64", "-r", "2"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "my-bundle"
    assert cli.main(["convert", str(checkpoint()), "--max-context", "256", "-q", "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def document(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("result") / "result.json"
    assert cli.main(["bench", str(bundle), *QUICK, "-q", "--output", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def result(document: dict[str, Any]) -> Result:
    return Result.parse(json.dumps(document).encode())


def rows(text: str) -> list[list[str]]:
    """The cells of a table, as Markdown reads them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# With the emulator


def test_each_line_says_emulated(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(bundle), *QUICK]) == 0
    said = capsys.readouterr()
    head, _, *lines = rows(said.out)
    assert head == ["model", "size", "params", "runtime", "test", "measured"]
    assert [line[4] for line in lines] == [
        "tg64 @ d128", "first token after 128", "pp16", "tg8", "pp16 @ d64", "tg8 @ d64", "load",
        "memory, peak of the process",
    ]  # fmt: skip
    assert all(line[3].startswith("emulated ") for line in lines)
    assert re.fullmatch(r"[\d.]+ ± [\d.]+ t/s", lines[0][5])
    assert "pp16 @ d64: " in said.err


def test_a_depth_beyond_the_context_is_lowered_and_said(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(bundle), "-p", "16,512", "-n", "", "-d", "3968", "-r", "1", "-q"]) == 0
    out = capsys.readouterr().out
    assert "pp16 @ d235" in [line[4] for line in rows(out)]
    assert "pp16 @ d235 stands for pp16 @ d3968: the context has 256 tokens." in out
    assert "pp512 @ d3968 does not fit into a context of 256 tokens." in out


def test_compat_takes_it_as_evidence(bundle: Path, document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(document))
    case = SimpleNamespace(digest=read_result(tmp_path / "mine.json").model.digest)
    shown = subprocess.run(
        own_command("compat", str(checkpoint()), "--json", "--dtype", "w8a8", "--max-context", "256", "--release",
                    document["runs"][0]["release"], "--platform", "rk3588", "--results", str(tmp_path)),
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    matrix = json.loads(shown.stdout)
    assert matrix["model"]["digest"] == case.digest
    evidence = [piece for cell in matrix["cells"] for piece in cell["evidence"] if "mine.json" in piece["source"]]
    assert [piece["level"] for piece in evidence] == [Level.EMULATED.value]
    assert Results([tmp_path]) is not None


def test_it_names_no_host_user_or_path(document: dict[str, Any], bundle: Path) -> None:
    text = json.dumps(document)
    for word in (str(bundle.parent), socket.gethostname(), str(Path.home()), "/tmp", "/work"):
        assert word not in text or len(word) < 3
    assert document["emulated"] is True


def start(bundle: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = own_command("bench", str(bundle), "--json", *words)
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


def test_ctrl_c_keeps_what_was_measured(bundle: Path) -> None:
    process = start(bundle, "-r", "100", "-p", "16", "-n", "64")
    assert process.stderr is not None
    assert "t/s" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads(out)
    assert found["bench"]["complete"] is False
    assert len(found["bench"]["lines"][0]["values"]) == 100
    assert found["runs"][0]["tokens_per_s"] > 0
    assert "was stopped" in markdown(Result.parse(out.encode()))
    assert "Traceback" not in err


def test_a_library_that_crashes_leaves_what_was_measured(bundle: Path) -> None:
    process = start(bundle, *QUICK, RKEMU_FAULT="segv-token=2")
    out, err = process.communicate(timeout=100)
    found = json.loads(out)
    assert process.returncode == 7, err
    assert "SIGSEGV" in found["bench"]["error"]
    assert found["runs"][0]["says"] == "It loads."
    assert "It ended early: " in markdown(Result.parse(out.encode()))
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words", [["-p", "x"], ["-p", "0"], ["-d", "-1"], ["-r", "0"], ["-p", "", "-n", ""], ["-p", ",".join("1" * 99)],
              ["--output", "/none/x"], ["-p", "1" * 5000]],
)  # fmt: skip
def test_wrong_numbers(bundle: Path, words: list[str]) -> None:
    if words == ["-p", ",".join("1" * 99)]:
        words = ["-p", ",".join(map(str, range(1, 99)))]
    assert cli.main(["bench", str(bundle), *words]) == 2


def test_the_only_bundle_is_meant_where_none_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("rkruntime.bundle.names._places", lambda: [tmp_path])
    assert cli.main(["bench", *QUICK, "-q"]) == 3
    (tmp_path / "one").symlink_to(bundle)
    assert cli.main(["bench", *QUICK, "-q"]) == 0
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "rkedge.yaml").write_text("")
    assert cli.main(["bench", *QUICK, "-q"]) == 3
    assert "one, two" in capsys.readouterr().err


def test_a_library_that_is_not_the_emulator_is_held_against_plan_and_board(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The emulator in the place of a board's library, and a board's files in the place of this machine's."""
    plant(tmp_path, IDLE)
    usual = bench.open_for_person

    def opened(*words: Any) -> Any:
        model = usual(*words)
        model.engine.info = replace(model.engine.info, emulated=False, driver_version="0.9.8")
        return model

    monkeypatch.setattr(bench, "open_for_person", opened)
    monkeypatch.setattr("rkboard.bench.session.glance", lambda: glance(tmp_path))
    monkeypatch.setattr("rkboard.bench.watch.glance", lambda _, **options: glance(tmp_path, **options))
    assert cli.main(["bench", str(bundle), *QUICK, "-q", "--output", str(tmp_path / "mine.json")]) == 0
    out = capsys.readouterr().out
    head, _, *lines = rows(out)
    assert head[5:] == ["measured", "plan"]
    assert {line[3] for line in lines} == {"RKLLM 1.2.3"}
    assert re.fullmatch(r"[\d.]+ t/s", lines[0][6])
    assert "board: Radxa ROCK 5B, rk3588, 15.3 GiB, kernel 6.1.115-vendor-rk35xx, driver 0.9.8" in out
    assert "npu 300 MHz (rknpu_ondemand), ddr 534 MHz (dmc_ondemand)" in out
    found = read_result(tmp_path / "mine.json")
    assert not found.emulated
    assert (found.board.soc, found.runs[0].cores, found.runs[0].context) == ("rk3588", 3, 256)


# What was to be expected

# https://github.com/airockchip/rknn-llm/blob/release-v1.3.0/benchmark.md, Gemma2 2B, w8a8
VENDOR = {"ttft_ms": 598.41, "decode_tokens_per_s": 10.37, "memory_mb": 2779.22}
GEMMA = {
    "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def planned(tmp_path: Path, plan: Any) -> Bundle:
    return SimpleNamespace(read_plan=lambda: plan)  # type: ignore[return-value]


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    made = make_plan(PlanRequest(model=str(tmp_path / "config.json"), toolkit="1.3.0", context=4096))
    self = as_dict(made)
    self["made"] = made
    return self


def test_the_vendors_row_is_the_vendors(tmp_path: Path, plan: dict[str, Any]) -> None:
    vendor = expected_of(planned(tmp_path, plan)).vendor
    assert vendor.of(Row("vendor", 64, 128)) == VENDOR["decode_tokens_per_s"]
    assert (vendor.ttft_ms, vendor.memory_mb) == (VENDOR["ttft_ms"], VENDOR["memory_mb"])
    assert vendor.of(Row("pp", 128)) == pytest.approx(128 / 0.59841)
    assert vendor.of(Row("pp", 512)) is None
    assert vendor.of(Row("tg", 64, 1024)) is None


@pytest.mark.parametrize(("depth", "tokens"), [(1024, 64), (3968, 64), (512, 128), (2000, 16)])
def test_the_plan_at_a_depth_is_what_the_planner_says_there(
    tmp_path: Path, plan: dict[str, Any], depth: int, tokens: int
) -> None:
    made = plan.pop("made")
    expected = 1000 / made.costs.token_ms(made.shape, made.kind, depth + tokens / 2)
    assert expected_of(planned(tmp_path, plan)).plan.of(Row("tg", tokens, depth)) == pytest.approx(expected, rel=0.002)


def test_a_bundle_has_the_digest_that_compat_looks_for(tmp_path: Path, plan: dict[str, Any]) -> None:
    assert expected_of(planned(tmp_path, plan)).digest == plan["made"].shape.digest


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["model", "prediction", "vendor", "digest", "ttft_ms", "decode_tokens_per_s", "memory_mb", "context",
     "prompt_tokens", "release", "decode_tokens_per_s_at_full_context"]
)  # fmt: skip


@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON))))
def test_a_plan_with_anything_in_it_is_read(plan: dict[str, Any]) -> None:
    found = expected_of(planned(Path(), plan))
    for figures in (found.plan, found.vendor):
        for row in (Row("pp", 128), Row("pp", 512), Row("tg", 64, 3968), Row("tg", 1), Row("vendor", 64, 128)):
            value = figures.of(row)
            assert value is None or 0 < value < float("inf")


# What the board did


def watched(root: Path, files: Mapping[str, Any], act: Callable[[], object], **options: Any) -> Watch:
    with running(root, files, **options), Watch(root) as watch:
        act()
    return watch


def put(root: Path, path: str, text: str) -> Callable[[], object]:
    return lambda: (root / path).write_text(f"{text}\n")


FIXED = {
    f"{DMC}/governor": "userspace\n",
    f"{DMC}/userspace/set_freq": "2112000000\n",
    f"{DMC}/cur_freq": "2112000000\n",
}


def test_a_steady_board_has_nothing_to_say(tmp_path: Path) -> None:
    watch = watched(tmp_path, {}, lambda: None)
    assert watch.changes == []
    assert {clock.name: clock.now for clock in watch.before.clocks}["npu"] == 300000000
    assert watch.hottest == 44.384


@pytest.mark.parametrize(
    ("files", "path", "text", "says"),
    [
        ({}, f"{CPU}4/scaling_governor", "powersave", "governor of cpu4 changed from ondemand to powersave"),
        ({}, f"{NPU}/governor", "performance", "governor of npu changed"),
        (FIXED, f"{DMC}/userspace/set_freq", "1320000000", "ddr was not always at 2112 MHz"),
        ({}, f"{CPU}4/scaling_max_freq", "1800000", "limit of cpu4 changed from 2256 MHz to 1800 MHz"),
        ({}, "sys/class/thermal/cooling_device0/cur_state", "3", "lowered clocks for heat"),
    ],
)  # fmt: skip
def test_a_change_is_said(tmp_path: Path, files: Mapping[str, Any], path: str, text: str, says: str) -> None:
    def change() -> None:
        put(tmp_path, path, text)()
        if "set_freq" in path:
            wait_until(lambda: (tmp_path / DMC / "cur_freq").read_text() == "1320000000\n")

    assert says in "; ".join(watched(tmp_path, files, change).changes)


def test_a_clock_that_follows_the_load_is_no_change(tmp_path: Path) -> None:
    # The kernel of the test takes it back at once: only the reading in between would see it.
    plant(tmp_path, IDLE)
    with Watch(tmp_path) as watch:
        put(tmp_path, f"{CPU}4/scaling_cur_freq", "2256000")()
    assert watch.changes == []


def test_throttling_in_between_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkboard.bench.watch._EVERY_S", 0.01)
    plant(tmp_path, IDLE)
    state, zone = (
        tmp_path / "sys/class/thermal/cooling_device0/cur_state",
        tmp_path / "sys/class/thermal/thermal_zone0/temp",
    )
    with Watch(tmp_path) as watch:
        state.write_text("2\n")
        zone.write_text("91000\n")
        wait_until(lambda: watch.hottest == 91.0)
        state.write_text("0\n")
        zone.write_text("60000\n")
    assert watch.changes == ["the kernel lowered clocks for heat (thermal-cpufreq-0)"]
    assert watch.hottest == 91.0


def test_a_board_whose_files_vanish_is_watched_on(tmp_path: Path) -> None:
    plant(tmp_path, IDLE)
    with Watch(tmp_path) as watch:
        (tmp_path / DMC / "cur_freq").unlink()
        (tmp_path / "sys/class/devfreq").rename(tmp_path / "gone")
    assert "ddr can no longer be read" in watch.changes


# The table


def of_a_board(result: Result) -> Result:
    clock = ClockFacts("npu", "userspace", 10**9, 0, 10**9, 10**9)
    bench = replace(
        result.bench, plan_title="plan", vendor_title="vendor, 1.3.0", changes=("it was hot",),
        before=replace(result.bench.before, clocks=(clock,), temperatures={"soc": 44.0}), hottest=81.0,
        lines=(Line("tg64 @ d128", "t/s", (10.2, 10.4), 10.3, 0.1414, 10.35, 10.37), Line("load", "s", (12.0,), 12.0)),
    )  # fmt: skip
    board = ResultBoard("Radxa ROCK 5B", "rk3588", "6.1.115", "0.9.8", "1.3.0", 15.6)
    return replace(result, emulated=False, board=board, bench=bench)


def test_a_boards_table_has_what_was_expected_beside_it(result: Result) -> None:
    text = markdown(of_a_board(result))
    head, _, speed, load = rows(text)
    assert head[5:] == ["measured", "plan", "vendor, 1.3.0"]
    assert speed[3:] == ["RKLLM 1.3.0", "tg64 @ d128", "10.30 ± 0.14 t/s *", "10.35 t/s", "10.37 t/s"]
    assert load[5:] == ["12.00 s *", "-", "-"]
    assert "board: Radxa ROCK 5B, rk3588, 15.6 GiB, kernel 6.1.115, driver 0.9.8" in text
    assert "npu 1000 MHz (userspace)" in text
    assert "44 degrees before, 81 degrees at most" in text
    assert "it was hot" in text
    assert "mulated" not in text


@given(st.text(max_size=60))
def test_no_text_breaks_the_table(text: str) -> None:
    document = of_a_board(Result.parse(json.dumps(PLAIN).encode()))
    board = ResultBoard(text, text, text, text, text)
    lines = (Line(text, "t/s", (1.0,), 1.0),)
    bench = replace(document.bench, changes=(text,), notes=(text,), vendor_title=text, family=text, lines=lines)
    found = markdown(replace(document, board=board, bench=bench))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", found)
    assert len({len(row) for row in rows(found)}) == 1


PLAIN = {
    "schema": "rkedge-compat/1", "made": "2026-01-01", "rkedge": "0.1.0", "emulated": False,
    "model": {"name": "m", "digest": ""},
    "board": {"name": "", "soc": "", "kernel": "", "driver": "", "library": ""},
    "runs": [{"type": "w8a8", "release": "1.2.3", "cores": 3, "context": 4096, "lora": "merged", "status": "works",
              "says": "x"}],
    "bench": {"schema": "rkedge-bench/1", "repetitions": 1, "family": "gemma2", "size": "2B", "parameters": 1,
              "file_bytes": 1, "plan_title": "", "vendor_title": "", "lines": [], "notes": [], "changes": [],
              "before": {}, "after": {}},
}  # fmt: skip


# On a board, over ssh


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("user@board", Place("user@board")),
        ("user@board:my-bundle", Place("user@board", "my-bundle")),
        ("user@board:/opt/b c", Place("user@board", "/opt/b c")),
        ("ssh://user@board:22", Place("ssh://user@board:22")),
        ("board", Place("board")),
        ("user@2001:db8::5", Place("user@2001:db8::5")),
        ("user@fe80::1%eth0", Place("user@fe80::1%eth0")),
        ("user@[2001:db8::5]:my-bundle", Place("user@2001:db8::5", "my-bundle")),
        ("user@192.0.2.7:b:c", Place("user@192.0.2.7", "b:c")),
    ],
)
def test_a_place_is_read_as_for_scp(text: str, place: Place) -> None:
    assert Place.parse(text) == place


@pytest.mark.parametrize("text", ["user@board:-o", "user@board:a\nb", "user@board:\x1b[2J"])
def test_a_name_that_no_bundle_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Place.parse(text)


def as_typed(script: str = "") -> str:
    """What runs the command that ssh brings, with this rkedge on the PATH."""
    return f'{script}PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; eval "$SSH_ORIGINAL_COMMAND"\n'


@needs_sshd
def test_a_board_measures_and_the_table_is_here(
    forced: Callable[[str], str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (odd := tmp_path / "a $(touch x) 'b'").symlink_to(bundle)
    assert cli.main(["bench", f"{forced(as_typed('echo motd >&2;'))}:{odd}", *QUICK, "--json"]) == 0
    said = capsys.readouterr()
    assert [line["test"] for line in json.loads(said.out)["bench"]["lines"]][:2] == [
        "tg64 @ d128",
        "first token after 128",
    ]
    assert "pp16 @ d64: " in said.err
    assert not Path("x").exists()


@needs_sshd
def test_ctrl_c_keeps_what_a_board_has_measured(forced: Callable[[str], str], bundle: Path) -> None:
    place = f"{forced(as_typed())}:{bundle}"
    pipe = subprocess.PIPE
    command = own_command("bench", place, "--json", "-r", "100", "-p", "16", "-n", "64")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    assert process.stderr is not None
    while "t/s" not in (line := process.stderr.readline()):
        assert line, "it ended"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    found = json.loads(out)
    assert found["bench"]["complete"] is False
    assert found["bench"]["lines"][0]["values"]


@needs_sshd
@pytest.mark.parametrize(
    ("script", "status", "says"),
    [
        ("exit 127", 8, "cannot find rkedge"),
        ("exit 3", 8, "ended with 3"),
        ("echo no", 8, "something other than a result"),
        ("yes", 8, "something other than a result"),
        ("echo '{\"error\": \"X\", \"message\": \"There is no bundle.\", \"hint\": \"h\"}'; exit 3", 8, "board: There"),
        ("echo '{\"schema\": \"rkedge-compat/1\"}'", 8, "is missing"),
        (f"echo {shlex.quote(json.dumps({**PLAIN, 'emulated': 'x'}))}", 8, "emulated is str"),
        (f"echo {shlex.quote(json.dumps({**PLAIN, 'runs': []}))}", 8, "no run"),
    ],
)  # fmt: skip
def test_a_board_that_misbehaves(
    forced: Callable[[str], str], script: str, status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", forced(f"{script}\n"), *QUICK]) == status
    assert says in " ".join(capsys.readouterr().err.split())


def test_what_a_board_sends_is_what_is_shown(result: Result) -> None:
    again = Result.parse(json.dumps(result.as_dict()).encode())
    assert markdown(again) == markdown(result)
    assert asdict(again) == asdict(result)


@given(JSON)
def test_a_document_with_anything_in_it_is_an_error_or_a_table(value: Any) -> None:
    for key in PLAIN:
        with suppress(ServiceError):
            markdown(Result.parse(json.dumps({**PLAIN, key: value}).encode()))
