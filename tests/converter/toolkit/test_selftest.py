"""`rkedge toolkit selftest` with each generation's stand-in, and with each way that an installation may be broken."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkconvert import demo
from rkconvert.commands import toolkit as command
from rkconvert.selftest import tiny
from rkconvert.selftest.answers import answers
from rkconvert.selftest.cases import NO_VOCABULARY_FILE, TRAINED_HEAD, Case
from rkconvert.selftest.report import Report
from rkconvert.selftest.run import CaseResult, Models, run
from rkconvert.toolkit.interpreter import Toolkit
from rkconvert.toolkit.options import ToolkitOptions
from rkruntime.cli import cli

Fail = Callable[[str], None]
# From the manuals 1.1.4 p.15 to 1.3.0 p.16.
TYPES = ["w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"]
USUAL, ADAPTER = Case("w8a8"), Case("w8a8", adapter=True)
HEAD, VOCABULARY = Case("w8a8", asks=TRAINED_HEAD), Case("w8a8", asks=NO_VOCABULARY_FILE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.write(tmp_path_factory.mktemp("models"))


@pytest.fixture
def tried(made: Models, environments: Callable[[str], Path]) -> Callable[..., list[CaseResult]]:
    """Carry cases out: `tried(USUAL, ADAPTER, version="1.3.0", patience=2)`."""

    def carry_out(*cases: Case, version: str = "1.2.3", patience: float = 900) -> list[CaseResult]:
        options = ToolkitOptions(toolkit_python=environments(version), toolkit_patience=patience)
        return list(run(cases, made, "rk3588", options))

    return carry_out


def selftest(*words: object) -> Result:
    return CliRunner().invoke(command.run, ["selftest", *map(str, words)], standalone_mode=True)


def statuses(outcomes: Sequence[CaseResult]) -> list[str]:
    return [outcome.status for outcome in outcomes]


@pytest.mark.parametrize(
    "version", [*(pytest.param(text, marks=pytest.mark.long) for text in ("1.1.4", "1.2.0", "1.2.3")), "1.3.0"]
)
def test_an_installation_that_works(environments: Callable[[str], Path], tmp_path: Path, version: str) -> None:
    path = tmp_path / "report.json"
    done = selftest("--toolkit-python", environments(version), "-o", path, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads(path.read_text())
    assert (report["passed"], report["complete"]) == (True, True)
    found = {case["case"]: case for case in report["cases"]}
    promised = [name for name, case in found.items() if case["status"] == "passed"]
    assert {name.split(",")[0] for name in promised} == {*TYPES, "fp16"}
    assert sum("adapter" in name for name in promised) == 3
    assert sum("calibrated" in name for name in promised) == 5
    assert {case["status"] for case in found.values()} == {"passed", "told"}
    for name in promised:
        made = found[name]["made"]
        assert made["calls"][1]["arguments"]["do_quantization"] is not name.startswith("fp16")
        assert (made["calls"][1]["arguments"]["dataset"] is not None) == ("calibrated" in name)
        assert (made["lora_file"] is not None) == ("adapter" in name)
        assert made["file"]["size"] > 2e6
    text = " ".join(done.stderr.split())
    context = 4096 if version == "1.1.4" else tiny.CONTEXT
    assert f"max_context_limit {context} (asked: {context})" in text
    assert "token_id of bos 2 (asked: 2); token_id of eos 1 (asked: 1 or 107); add_bos_token True" in text
    assert "9 of 9 passed" in text
    assert report["answers"]["Does it keep a trained head?"].startswith("yes")


def test_nothing_of_this_machine_is_in_the_report(
    environments: Callable[[str], Path], fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "cases", lambda *_: [USUAL, ADAPTER, HEAD, VOCABULARY])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    fail("lora:nothing")
    path = tmp_path / "report.json"
    done = selftest("--toolkit-python", environments("1.2.3"), "-o", path)
    assert done.exit_code == 7
    assert "1 of 2 passed, 1 failed" in done.stdout
    text = path.read_text()
    assert "wrote no file for the adapter" in text
    assert str(tmp_path) not in text
    assert str(environments("1.2.3")) not in text
    assert not list((tmp_path / "scratch").iterdir())


def test_a_question_that_cannot_be_asked_fails_nothing(
    toolkit: Callable[[str], Toolkit], tried: Callable[..., list[CaseResult]], fail: Fail
) -> None:
    report = Report(toolkit("1.2.3"), "rk3588", tried(USUAL), complete=True)
    fail("load:killed")
    report.outcomes += tried(HEAD, VOCABULARY)
    assert statuses(report.outcomes) == ["passed", "told", "not run"]
    assert (report.passed, report.exit_code) == (True, 0)
    assert "it cannot be converted" in answers(report.outcomes)["Does it keep a trained head?"]
    report.complete = False
    assert (report.passed, report.exit_code) == (False, 7)


@pytest.mark.parametrize(
    ("fault", "words", "exit_code"),
    [
        ("import:pkg_resources", "cannot be imported", 5),
        ("load:killed", "killed by signal 9", 5),
        ("export:disk", "found a disk full", 5),
        ("build:hang", "showed no activity", 7),
    ],
)
def test_what_would_fail_in_every_case_ends_it(
    tried: Callable[..., list[CaseResult]], fail: Fail, fault: str, words: str, exit_code: int
) -> None:
    fail(fault)
    first, *others = tried(USUAL, ADAPTER, HEAD, VOCABULARY, patience=2)
    assert (first.status, first.exit_code) == ("failed", exit_code)
    assert words in first.error["message"]
    assert first.error["hint"]
    assert statuses(others) == ["not run"] * 3
    assert set(answers([first, *others]).values()) <= {"not known", "not known: its log does not say", "yes"} | {
        text for text in answers([first, *others]).values() if words in text
    }


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("load:segfault", "signal 11"), ("build:return", "build returned -1"), ("export:exit", "exit(3)"),
        ("write:nothing", "wrote no model file"), ("write:short", "weights alone take"),
    ],
)  # fmt: skip
def test_a_failure_of_one_case_is_its_own(
    tried: Callable[..., list[CaseResult]], fail: Fail, fault: str, words: str
) -> None:
    fail(fault)
    outcomes = tried(USUAL, VOCABULARY)
    assert statuses(outcomes) == ["failed", "told"]
    assert all(words in outcome.error["message"] for outcome in outcomes)
    assert (
        "fails with tokenizer.model, too"
        in answers([*outcomes, CaseResult(HEAD, "not run")])["Is tokenizer.json alone enough?"]
    )


@pytest.mark.parametrize(
    ("fault", "case", "question", "answer"),
    [
        ("head:dropped", HEAD, "Does it keep a trained head?", "it seems to be lost"),
        ("vocabulary:needed", VOCABULARY, "Is tokenizer.json alone enough?", "no, keep tokenizer.model"),
        ("template:system", HEAD, "Does it take Gemma's chat template?", "no: the toolkit renders a system message"),
        ("lora:nothing", ADAPTER, "Does it write an adapter's file?", "no: "),
        ("settings:bos", HEAD, "What does it set in the file?", "add_bos_token False (asked: True)"),
        ("settings:context", HEAD, "What does it set in the file?", "max_context_limit 512 (asked: 2048)"),
        ("logits:segfault", HEAD, "Does it compute logits (--verify)?", "no: it ended with signal 11"),
        ("load:return", HEAD, "Does it take the model's settings?", "no: "),
        ("export:return", HEAD, "Does it take the tokenizer?", "probably not: "),
    ],
)
def test_questions_that_nobody_has_answered(
    tried: Callable[..., list[CaseResult]], fail: Fail, fault: str, case: Case, question: str, answer: str
) -> None:
    fail(fault)
    outcomes = tried(USUAL, case)
    rest = [CaseResult(other, "not run") for other in (ADAPTER, HEAD, VOCABULARY) if other != case]
    assert answer in answers([*outcomes, *rest])[question]
    doubts = [text for outcome in outcomes for text in outcome.made.get("doubts", ())]
    assert any("was asked for" in text for text in doubts) == fault.startswith("settings")
    # What goes wrong once is not asked for again.
    assert sum(bool(outcome.problem) for outcome in outcomes) <= 1


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("fault", ["", "logits:head"])
def test_logits(tried: Callable[..., list[CaseResult]], fail: Fail, fault: str) -> None:
    fail(fault)
    outcomes = tried(USUAL, HEAD)
    found = {outcome.case: [prompt["kl"] for prompt in outcome.verified["prompts"]] for outcome in outcomes}
    assert [len(kls) for kls in found.values()] == [3, 3]
    assert max(found[USUAL]) < 1e-5
    assert (min(found[HEAD]) > 0.1) == bool(fault)
    rest = CaseResult(VOCABULARY, "not run")
    assert answers([*outcomes, rest])["Does it compute logits (--verify)?"].startswith("yes; KL from the float model")


def test_files_that_differ_by_themselves_tell_nothing_about_the_head(tried: Callable[..., list[CaseResult]]) -> None:
    tied, again, head, rest = tried(USUAL, ADAPTER, HEAD, VOCABULARY)
    masked = [replace(item, content=os.urandom(len(item.content))) for item in (tied, again, head)]
    assert "files of the same weights differ" in answers([*masked, rest])["Does it keep a trained head?"]
    assert "probably" in answers([tied, CaseResult(ADAPTER, "not run"), head, rest])["Does it keep a trained head?"]


def test_no_toolkit() -> None:
    done = CliRunner().invoke(cli, ["toolkit", "selftest", "--json"])
    assert "none is set up" in str(done.exception)
    assert getattr(done.exception, "exit_code", None) == 5


def test_a_report_that_cannot_be_written_is_said_before_the_work(
    environments: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "models", None)
    for path, words in ((tmp_path, "exists already"), (tmp_path / "none" / "r.json", "no folder")):
        done = selftest("--toolkit-python", environments("1.2.3"), "-o", path)
        assert words in str(done.exception)


def test_a_disk_that_is_full_from_the_start(
    environments: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tiny, "write_weights", full)
    done = selftest("--toolkit-python", environments("1.2.3"), "-o", tmp_path / "r.json")
    assert "disk is full" in str(done.exception)
    assert getattr(done.exception, "exit_code", None) == 5


def test_ctrl_c_leaves_the_report_so_far(environments: Callable[[str], Path], tmp_path: Path) -> None:
    path, words = tmp_path / "r.json", ["toolkit", "selftest", "--toolkit-python", str(environments("1.2.3"))]
    with subprocess.Popen(
        [sys.executable, "-m", "rkruntime.cli", *words, "-o", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("passed"):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        text = process.stderr.read()
    assert process.returncode == 130, text
    assert "the report so far" in text
    report = json.loads(path.read_text())
    assert (report["complete"], report["passed"]) == (False, False)
    assert report["cases"][0]["status"] == "passed"


def test_the_model_is_one_that_other_libraries_read(made: Models) -> None:
    folder = made.checkpoint("")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert model.config.head_dim >= 128
    assert model.lm_head.weight is model.model.embed_tokens.weight
    own = AutoModelForCausalLM.from_pretrained(made.checkpoint(TRAINED_HEAD))
    assert not (own.lm_head.weight == own.model.embed_tokens.weight).all()
    adapted = PeftModel.from_pretrained(model, made.adapter)
    assert sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name) > 0
    template = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert template == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    rows: list[dict[str, Any]] = json.loads(made.calibration.read_text())
    assert len(rows) >= 16
    assert all(row["input"].startswith("<bos><start_of_turn>user\n") for row in rows)


def test_both_vocabulary_files_say_the_same(made: Models) -> None:
    sentencepiece = importlib.import_module("sentencepiece")
    folder = made.checkpoint("")
    reads = sentencepiece.SentencePieceProcessor(model_file=str(folder / tiny.VOCABULARY_FILE))
    fast = AutoTokenizer.from_pretrained(folder)
    assert (reads.pad_id(), reads.eos_id(), reads.bos_id(), reads.unk_id()) == (0, 1, 2, 3)
    assert reads.get_piece_size() == len(fast)
    texts = [text for item in demo.questions() for text in (item.question, item.answer, item.pirate)]
    for text in [*texts, "<start_of_turn>user\nhé 🙂  x<end_of_turn>", "  two  spaces ", "a\n\nb\tc"]:
        assert reads.encode(text) == fast(text, add_special_tokens=False)["input_ids"], text
