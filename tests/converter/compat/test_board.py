"""Bundles on a board over ssh: what comes of it, and that neither cuts nor lies leave anything behind."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.converter.compat.boards import Loopback, loopback
from tests.runtime.serve.sshd import SSHD

from rkboard.emulator.build import build
from rkconvert.compat import board as visits
from rkconvert.compat.journal import Journal
from rkconvert.compat.results import _EMULATOR_S, read_result
from rkconvert.demo import checkpoint
from rkruntime import cli
from rkruntime.bundle.manifest import open_bundle
from rkruntime.errors import BundleError, ServiceError, UsageError
from rkruntime.probes import QUESTIONS

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="there is no sshd here")
RELEASE = "1.3.0"
LIAR = Path(__file__).with_name("liar.py")
QUICK = ("template", "end")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "demo"
    assert cli.main(["convert", str(checkpoint()), "--release", RELEASE, "-q", "-o", str(path)]) == 0
    return path


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    library = build(RELEASE, progress=lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "host"))
    monkeypatch.setattr(visits, "_WAITS_S", (0.1,) * 20)
    monkeypatch.delenv("RKEMU_GUESS", raising=False)
    with loopback(tmp_path, library, monkeypatch) as found:
        yield found


def compat(board: Loopback, bundle: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    output = board.home / "results"
    code = cli.main(["compat", str(bundle), *board.words, "-q", "-o", str(output), *words])
    paths = sorted(output.glob("*.json"))
    for path in paths:
        read_result(path)
    return code, [json.loads(path.read_text()) for path in paths]


def asked(*names: str) -> list[str]:
    return [word for name in names for word in ("--probe", name)]


def results_of(found: dict[str, Any]) -> dict[str, str]:
    return {probe["name"]: probe["result"] for probe in found["runs"][0]["probes"]}


def test_all_of_it(board: Loopback, bundle: Path) -> None:
    code, (found,) = compat(board, bundle, "--risky")
    assert code == 0
    (run,) = found["runs"]
    assert (found["emulated"], found["board"]["name"]) == (True, "emulator")
    assert (run["status"], run["selftest"], run["release"]) == ("works", "same", RELEASE)
    assert results_of(found).keys() == QUESTIONS.keys()
    assert any(_EMULATOR_S in line for line in run["log"])  # by which a file that denies it is found out
    assert "failed" not in results_of(found).values()
    # These are a PC's.
    assert (run["tokens_per_s"], run["first_token_ms"], run["memory_mb"]) == (0, 0, 0)
    assert os.uname().nodename not in json.dumps(found)
    assert board.left() == []
    assert board.quiet()


@pytest.mark.parametrize("rsync", [True, False])
def test_a_copy_goes_on_where_it_was(
    board: Loopback, bundle: Path, rsync: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rsync and not shutil.which("rsync"):
        pytest.skip("there is no rsync here")
    if not rsync:
        monkeypatch.setattr(visits.Visit, "_rsynced", lambda *_: False)
    real, calls = visits.Visit._call, []

    def call(self: Any, journal: Any, operation: str, *words: str, **more: Any) -> Any:
        calls.append((operation, *words))
        answer = real(self, journal, operation, *words, **more)
        if operation == "open" and len(calls) == 1:
            there = Path(answer["folder"]) / "model.rkemu"
            there.write_bytes((bundle / "model.rkemu").read_bytes()[:100_000])
            return {**answer, "sizes": {"model.rkemu": 100_000}}
        return answer

    monkeypatch.setattr(visits.Visit, "_call", call)
    code, (found,) = compat(board, bundle, *asked("end"))
    assert code == 0
    assert results_of(found) == {"end": "ends"}
    if not rsync:
        assert ("receive", "model.rkemu", "100000") in calls
    assert [name for name, *_ in calls if name == "check"] == ["check"]


def test_what_arrives_damaged_is_sent_again(board: Loopback, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, damaged = visits.Visit._call, []

    def call(self: Any, journal: Any, operation: str, *words: str, **more: Any) -> Any:
        if operation == "check" and not damaged:
            (there,) = (board.home / "cache").rglob("model.rkemu")
            data = bytearray(there.read_bytes())
            data[5000] ^= 1
            there.write_bytes(data)
            damaged.append(there)
        return real(self, journal, operation, *words, **more)

    monkeypatch.setattr(visits.Visit, "_call", call)
    code, (found,) = compat(board, bundle, *asked("end"))
    assert (code, found["runs"][0]["status"], len(damaged)) == (0, "works", 1)


def test_a_load_that_fails_is_a_result(board: Loopback, bundle: Path) -> None:
    board.environment["RKEMU_FAULT"] = "alloc-14"
    code, (found,) = compat(board, bundle)
    (run,) = found["runs"]
    assert (code, run["status"], run["probes"]) == (7, "fails at load", [])
    assert found["board"]["library"] == RELEASE
    assert any("failed to" in line for line in run["log"])
    assert board.left() == []


# The RAM of an emulated board is a PC's, and so is whatever kills or confuses it without a word on the model.
@pytest.mark.parametrize(
    "fault",
    ["no-device", "alloc-24", "platform-mismatch", "few-cpus", "alloc-22", "host-memory", "oom-killed", "ill-init",
     "exit-init", "segv-init", "silent-failure"],
)  # fmt: skip
def test_a_load_that_the_machine_prevents_says_nothing_of_its_cell(
    board: Loopback, bundle: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    board.environment["RKEMU_FAULT"] = fault
    assert compat(board, bundle) == (ServiceError.exit_code, [])
    assert "says: " in capsys.readouterr().err
    assert board.left() == []
    if fault in ("no-device", "oom-killed", "silent-failure"):  # each takes as long as all of the above
        board.environment.clear()
        code, (found,) = compat(board, bundle, *asked("end"))
        assert (code, found["runs"][0]["status"]) == (0, "works")


def test_the_first_run_answers_what_the_library_adds(board: Loopback, bundle: Path) -> None:
    """RKEdge empties the template as soon as it has seen it."""
    board.environment["RKEMU_GUESS"] = "tokens-wrapped"
    code, (found,) = compat(board, bundle, *asked("end", "template"))
    assert (code, results_of(found)["template"]) == (0, "wrapped")


def test_one_process_makes_a_visit(board: Loopback, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another one would remove the copy below its hands."""
    hold = (
        "import sys; from rkconvert.compat.journal import Journal; from rkruntime.bundle.manifest import open_bundle\n"
        "with Journal.held('open', open_bundle(sys.argv[1]), '--library', sys.argv[2]): print(flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(bundle), str(board.library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout
        assert other.stdout.readline()
        assert compat(board, bundle) == (ServiceError.exit_code, [])
        assert "Another process is trying" in capsys.readouterr().err
        other.communicate(b"\n")
    assert compat(board, bundle, *asked("end"))[0] == 0


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path) -> Callable[..., tuple[int, Path]]:
    """A board that answers everything, with these changes of what it says of its load; the bundle is not emulated."""
    made = tmp_path / "made"
    shutil.copytree(bundle, made)
    manifest = made / "rkedge.yaml"
    manifest.write_text(manifest.read_text().replace("target: emulator", "target: toolkit"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "host"))

    def run(**load: Any) -> tuple[int, Path]:
        known = {
            "loads": True, "says": "It was loaded.", "log": [], "library": RELEASE, "emulated": False, "context": 4096,
            "board": "B", "soc": "rk3588", "kernel": "6.1", "driver": "0.9.8", "ram_gib": 16.0,
        }  # fmt: skip
        answers = {"open": {"protocol": 1, "rkedge": "", "folder": "", "sizes": {}, "rsync": False, "free": 1 << 40}}
        answers["open"]["boot"] = ""
        answers |= {"check": {"wrong": []}, "receive": {}, "remove": {}}
        (tmp_path / "answers").write_text(json.dumps({"answers": answers, "load": known | load}))
        monkeypatch.setenv("RKEDGE_SSH", shlex.join([sys.executable, str(LIAR), str(tmp_path / "answers")]))
        code = cli.main(["compat", str(made), "--board", "b", "-q", "-o", str(tmp_path / "out"), *asked("end")])
        return code, tmp_path / "out"

    return run


@pytest.mark.parametrize(
    "load",
    [
        {"soc": "rk3566"}, {"soc": "rk3576"}, {"library": "mine"}, {"context": 1 << 40}, {"context": 0.5},
        {"ram_gib": 1e9}, {"says": "\ud800"},
    ],
)  # fmt: skip
def test_what_a_board_says_never_makes_a_file_that_is_not_a_result(
    liar: Callable[..., tuple[int, Path]], load: dict[str, Any]
) -> None:
    code, output = liar(**load)
    assert code == ServiceError.exit_code
    assert list(output.glob("*.json")) == []


@pytest.mark.parametrize("load", [{}, {"soc": ""}, {"library": ""}, {"board": ""}, {"context": 0}])
def test_what_a_board_does_not_know_of_itself_costs_no_result(
    liar: Callable[..., tuple[int, Path]], load: dict[str, Any]
) -> None:
    code, output = liar(**load)
    (path,) = output.glob("*.json")
    assert (code, read_result(path).board.soc, read_result(path).emulated) == (0, "rk3588", False)


def test_a_crash_in_a_probe_is_its_result_and_the_next_one_is_asked(board: Loopback, bundle: Path) -> None:
    board.environment["RKEMU_FAULT"] = "segv-token=20"  # only the long answers have so many
    code, (found,) = compat(board, bundle, *asked("template", "logits"))
    assert code == 0
    assert results_of(found) == {"template": "plain", "logits": "all"}


def test_wrong_answers_are_told_from_failed_loads(board: Loopback, bundle: Path) -> None:
    board.environment["RKEMU_DRIVER"] = "0.8.2"
    code, (found,) = compat(board, bundle, "--force", *asked("end"))
    assert (code, found["runs"][0]["status"], found["runs"][0]["selftest"]) == (7, "wrong answers", "failed")


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("rkedge-that-is-not-there", "has no rkedge-that-is-not-there"),
        ("sh -c 'exit 2'", "does not know `visit`"),
        ("sh -c 'yes aaaaaaaaaaaaaaaaaaaaaaaaaaaa | head -c 20000000'", "sent megabytes"),
        ("echo RKEDGE-VISIT {", "not an answer"),
        ("echo RKEDGE-VISIT 7", "not an answer"),
        ("""printf 'RKEDGE-VISIT {"event": "open", "protocol": 9}\\n'""", "not an answer"),
        ("""printf 'RKEDGE-VISIT {"event": "error", "message": "\\\\u001b[2J no"}\\n'""", r"\x1b[2J no"),
        ("'", "cannot be read"),
    ],
)
def test_what_is_missing_on_a_board_is_said(
    board: Loopback, bundle: Path, program: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["compat", str(bundle), "--board", "open", "--remote-command", program, "-o", str(board.home)])
    shown = capsys.readouterr().err
    assert code == (UsageError if program == "'" else ServiceError).exit_code
    assert says in shown
    assert "defect" not in shown
    assert "\x1b" not in shown


def test_a_board_that_is_not_there_is_not_waited_for(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RKEDGE_SSH", "sh -c 'echo no route >&2; exit 255'")
    assert cli.main(["compat", str(bundle), "--board", "u@b", "-o", str(tmp_path)]) == ServiceError.exit_code
    assert "cannot be reached" in capsys.readouterr().err


def test_what_a_board_lacks_is_said_and_the_copy_removed(
    board: Loopback, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--board", "open", "--remote-command", shlex.join(board.program), "--library", "/nowhere/librkllmrt.so"]
    assert cli.main(["compat", str(bundle), *words, "-o", str(board.home / "results")]) == ServiceError.exit_code
    assert "open says: " in capsys.readouterr().err
    assert board.left() == []


def test_another_library_than_before_is_asked_everything(
    board: Loopback, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.of("open", open_bundle(bundle), "--library", board.library)
    journal.results = {
        "load": {"loads": True, "says": "x", "library": "1.1.0"},
        "end": {"result": "goes-on", "says": "It did so once."},
    }
    journal.save()
    code, (found,) = compat(board, bundle, *asked("end"))
    assert (code, results_of(found)) == (0, {"end": "ends"})


def test_a_load_that_went_well_before_is_not_called_a_failure(
    board: Loopback, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal.of("open", open_bundle(bundle), "--library", board.library)
    journal.results = {"load": {"loads": True, "says": "x", "library": "1.3.0"}}
    journal.save()
    board.environment["RKEMU_FAULT"] = "alloc-14"
    code, found = compat(board, bundle)
    assert (code, found) == (ServiceError.exit_code, [])
    assert "has loaded it before" in capsys.readouterr().err


def test_links_in_a_bundle_are_followed(board: Loopback, bundle: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    shutil.copytree(bundle, linked)
    (linked / "model.rkemu").rename(linked / "blob")
    (linked / "model.rkemu").symlink_to("blob")
    assert compat(board, linked, *asked("end"))[0] == 0


def test_a_damaged_bundle_is_not_sent(board: Loopback, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "model.rkemu").write_bytes(b"x" * (copy / "model.rkemu").stat().st_size)
    assert compat(board, copy)[0] == BundleError.exit_code
    assert board.left() == []


@pytest.mark.parametrize(
    "result",
    [
        {"result": "plain"},
        {"says": "x", "result": 7},
        {"says": "x" * 501, "result": ""},
        {"says": "x", "result": "", "more": 1},
        {"says": "x", "result": "", "clocks": {"a" * 201: 1}},
        {"says": "x", "result": "", "clocks": {"a": -1}},
        {"says": "x", "result": "", "tokens_per_s": 1e400},
        [],
        None,
    ],
)
def test_a_board_s_result_is_checked(result: Any) -> None:
    with pytest.raises(ServiceError, match="not an answer"):
        visits._checked("template", result)


def test_options_of_a_board_need_one(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compat", str(bundle), "--risky", "--probe", "end"]) == UsageError.exit_code
    assert "--probe, --risky: only --board does that" in capsys.readouterr().err
    assert cli.main(["compat", str(bundle), "-o", "x", "--target", "emulator"]) == UsageError.exit_code
    assert "--output, --target: only --board does that" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--html", "x"], ["--why"], ["--no-emulator"], ["--dtype", "w8a8"]])
def test_options_that_a_board_has_no_use_for(bundle: Path, words: list[str], tmp_path: Path) -> None:
    line = ["compat", str(bundle), "--board", "u@b", "-o", str(tmp_path / "x"), *words]
    assert cli.main(line) == UsageError.exit_code
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_is_converted_first(board: Loopback) -> None:
    words = ["--target", "emulator", "--dtype", "w8a8", "--release", RELEASE, *asked("end")]
    code, (found,) = compat(board, checkpoint(), *words)
    assert (code, found["runs"][0]["type"]) == (0, "w8a8")
    assert (board.home / "results" / "variants" / f"checkpoint-rk3588-w8a8-{RELEASE}").is_dir()
    assert board.left() == []


# Cuts


def start(board: Loopback, bundle: Path) -> subprocess.Popen[bytes]:
    """The command in a process that can be killed, with waits as short as here."""
    code = (
        "import sys; from rkconvert.compat import board; board._WAITS_S = (0.1,) * 50;"
        " from rkruntime import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["compat", str(bundle), *board.words, "-o", str(board.home / "results"), *asked(*PROBES)]
    with (board.home / "host.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", code, *words], stdout=log, stderr=log)


PROBES = ("template", "end", "logits", "history", "window", "pause", "prompt-cache")
CUTS = ("connection", "process", "power", "host")


def cut(board: Loopback, kind: str, host: subprocess.Popen[bytes]) -> None:
    if kind == "connection":
        board.sshd.drop()
    elif kind == "host":
        host.send_signal(signal.SIGKILL)
        host.wait()
    else:
        board.kill(power=kind == "power")


def survives(board: Loopback, bundle: Path, cuts: list[tuple[str, float]]) -> str:
    """Run it with these cuts, each after so many seconds; it is started again when it was killed, or gave up.

    It gives up at a board that has never answered. Returns its output.
    """
    board.pause_ms, board.environment = 40, {"RKEMU_TOKEN_US": "15000", "RKEMU_PROMPT_TOKEN_US": "3000"}
    host = start(board, bundle)
    for kind, seconds in cuts:
        until = time.monotonic() + seconds
        while time.monotonic() < until and host.poll() is None:
            time.sleep(0.01)
        if host.poll() is None:
            cut(board, kind, host)
        if host.poll() is not None and not list((board.home / "results").glob("*.json")):
            host = start(board, bundle)
    status = host.wait(240)
    if status == ServiceError.exit_code:
        status = start(board, bundle).wait(240)
    log = (board.home / "host.log").read_text()
    assert status == 0, log
    return log


def check_whole(board: Loopback) -> None:
    (path,) = (board.home / "results").glob("*.json")
    found = read_result(path)
    assert [probe.name for probe in found.runs[0].probes] == list(PROBES)
    assert {probe.result for probe in found.runs[0].probes}.isdisjoint({"", "failed"})
    assert (found.runs[0].status, found.runs[0].selftest) == ("works", "same")
    assert board.left() == []
    assert list((board.home / "cache").rglob("visits")) == []
    board.sshd.daemon.wait_until(board.quiet, 60)


@pytest.mark.long
@pytest.mark.parametrize("kind", CUTS)
def test_one_cut(board: Loopback, bundle: Path, kind: str) -> None:
    survives(board, bundle, [(kind, 6.0)])
    check_whole(board)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_cuts_at_random_moments(board: Loopback, bundle: Path, seed: int) -> None:
    chance = random.Random(seed)
    cuts: list[tuple[str, float]] = [
        (CUTS[seed % 4], chance.uniform(0.2, 14)),
        (chance.choice(CUTS), chance.uniform(0.2, 8)),
    ]
    survives(board, bundle, cuts)
    check_whole(board)


@pytest.mark.long
def test_a_board_that_restarts_in_a_probe_each_time_is_not_asked_again(
    board: Loopback, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.environment["RKEMU_TOKEN_US"] = "100000"  # so that it is not over before
    real: Callable[..., Any] = visits.Visit._note

    def note(self: Any, journal: Any, event: Any) -> None:
        real(self, journal, event)
        if event == {"event": "begin", "step": "pause"}:
            board.kill(power=True)

    monkeypatch.setattr(visits.Visit, "_note", note)
    code, (found,) = compat(board, bundle, *asked("end", "pause", "hidden"))
    assert code == 0
    assert results_of(found) == {"end": "ends", "pause": "lost", "hidden": "all"}
    assert "restarted each time, 2 times" in json.dumps(found)
    assert board.left() == []
