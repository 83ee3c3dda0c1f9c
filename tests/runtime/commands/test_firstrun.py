"""`rkedge firstrun` over the emulator: each question is answered, and the other way when the library behaves so."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import checkpoint
from rkruntime import cli, probes
from rkruntime.engine.generation import Finished, FinishReason, Request
from rkruntime.errors import RefusedError, WorkerCrashedError
from rkruntime.probes import trial as trials

USUAL = {
    "template": "It read 19 tokens of a prompt of 19: it adds nothing.",
    "reuse": "It gives the same answer; 18 tokens of 19 came from the cache.",
    "end": "It ends by itself, and does not pass the last token on.",
    "abort": "The next run gives the same answer.",
    "hidden": "It returns a row for each token, also the second time.",
    "logits": "It returns a row for each token, also the second time. "
    "By the last one, the answer begins with the likeliest token.",
    # The last token of the answer before is read too.
    "pause": "It read 20 tokens of a prompt of 19; once the cache is cleared, the same answer.",
}
First = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("firstrun")
    made = {release: folder / release for release in ("1.1.4", "1.3.0")}
    for release, path in made.items():
        assert cli.main(["convert", str(checkpoint()), "--release", release, "-q", "-o", str(path)]) == 0
    return made


@pytest.fixture
def first(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> First:
    monkeypatch.delenv("RKEMU_GUESS", raising=False)

    def run(*arguments: str, release: str = "1.3.0", **environment: str) -> tuple[int, dict[str, Any]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        output = tmp_path / "report.json"
        code = cli.main(["firstrun", str(bundles[release]), "-o", str(output), *arguments])
        return code, json.loads(output.read_text())

    return run


def said(report: dict[str, Any]) -> dict[str, str]:
    return {name: found["says"] for name, found in report["answers"].items()}


def test_what_the_emulator_does(first: First, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = first("--risky")
    shown = capsys.readouterr()
    assert code == 0
    assert {name: said(report)[name] for name in USUAL} == USUAL
    assert "another load gives the same answer, with 1 token read" in said(report)["prompt-cache"]
    assert "FAILED" not in shown.out
    assert "ANOTHER" not in shown.out
    assert report["model"]["emulated"] is True
    assert "nothing of it is an answer about a board" in shown.err
    assert report["machine"]["kernel"] == platform.release()
    assert platform.node() not in json.dumps(report)
    assert str(Path.home()) not in json.dumps(report)


@pytest.mark.parametrize(
    ("guess", "name", "says"),
    [
        (
            "tokens-wrapped",
            "template",
            "It read 27 tokens of a prompt of 19, and 19 of it after its template was emptied:"
            " it adds its own template.",
        ),
        ("pause-resumes", "pause", "It FAILED: The runtime continued the paused run and did not read this prompt."),
    ],
)
def test_what_a_board_may_do_instead(first: First, guess: str, name: str, says: str) -> None:
    code, report = first("--risky", RKEMU_GUESS=guess)
    assert code == 0
    assert said(report) == {**said(report), **USUAL, name: says}


def test_an_old_release(first: First) -> None:
    code, report = first(release="1.1.4")
    assert code == 0
    assert said(report)["template"] == "This release does not say how many tokens it has read."
    assert said(report)["history"].startswith("Not with this release: ")
    assert set(report["answers"]).isdisjoint({"pause", "prompt-cache"})


def test_a_crash_is_an_answer_and_the_next_question_is_asked(first: First) -> None:
    code, report = first("--json", RKEMU_FAULT="segv-token")
    assert code == 0
    assert report["answers"]["template"]["error"]["error"] == WorkerCrashedError.__name__
    assert said(report)["hidden"] == USUAL["hidden"]


def test_a_run_without_its_end_is_not_a_release_without_figures(first: First) -> None:
    code, report = first("--risky", RKEMU_FAULT="lost-finish")
    assert code == 0
    assert said(report)["template"] == "This run did not say how many tokens it has read."
    assert said(report)["reuse"] == "It gives the same answer; this run did not say how many tokens it has read."
    assert "None" not in json.dumps(said(report))
    assert report["complete"] is True


def test_a_small_context_is_said_as_it_is(first: First, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_PROMPT", "What is the RK3588?")  # its answer takes 15 tokens
    code, report = first("--max-context", "32")
    assert code == 0
    words = said(report)["end"].split()
    assert words[:4] == ["No", "answer", "ended", "within"]
    assert 0 < int(words[4]) < 15


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_a_short_answer_is_paused_too_or_the_question_not_answered(
    first: First, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    short = trials.Run([], Finished(FinishReason.STOP, 19, 0))
    real = probes.Trial.run

    def run(trial: Any, request: Request) -> Any:
        if request.pause_tokens or not tokens:
            return real(trial, request) if tokens else short
        return real(trial, replace(request, max_new_tokens=tokens))

    monkeypatch.setattr(probes, "QUESTIONS", {"pause": probes.QUESTIONS["pause"]})
    monkeypatch.setattr(probes.Trial, "run", run)
    _, report = first("--risky")
    says = said(report)["pause"]
    assert says == (USUAL["pause"] if tokens else "Not answered: the run did not pause.")


def test_what_is_broken_off_says_so(
    first: First, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    real = probes.Trial.run

    def run(trial: Any, request: Request) -> Any:
        runs.append(request)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return real(trial, request)

    monkeypatch.setattr(probes.Trial, "run", run)
    code, report = first()
    shown = capsys.readouterr()
    assert code == 130
    assert report["complete"] is False
    assert list(report["answers"]) == ["template", "reuse"]
    assert "as far as it went, with 2 answers" in shown.err
    assert "Please send" not in shown.err


def test_a_place_that_cannot_be_written_shows_first(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["firstrun", str(bundles["1.3.0"]), "-o", str(tmp_path / "none" / "report.json")]) != 0
    shown = capsys.readouterr()
    assert "There is no folder" in shown.err
    assert "Does it" not in shown.out


def test_a_load_that_fails_is_written_down(first: First) -> None:
    code, report = first(RKEMU_FAULT="init-fails")
    assert code != 0
    assert report["answers"] == {}
    assert report["error"]["message"]
    assert report["machine"]["machine"] == platform.machine()
    assert code != RefusedError.exit_code
