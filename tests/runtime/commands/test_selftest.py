"""`rkedge run --selftest`: faults made in the emulator, in the bundle and in the weights, and what it says to each.

No fault is made from the self-test's own limits, and each verdict is what a person would say who knows the fault.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.conftest import with_file
from transformers import AutoModelForCausalLM

from rkconvert.conversion.convert import Options, convert
from rkconvert.demo import adapter, checkpoint
from rkruntime import RKEdgeError, SamplingOptions, cli, open_model, run_selftest
from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.engine.generation import Finished, FinishReason, Request, Token
from rkruntime.errors import BundleError, ContextFullError, UsageError
from rkruntime.selftest import SelfTestResult
from rkruntime.testing import FakeEngine

Ask = Callable[..., tuple[int, dict[str, Any]]]
Change = Callable[[torch.Tensor], torch.Tensor]
SELFTEST = "report/selftest.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return convert(Options(checkpoint=str(checkpoint()), output=tmp_path_factory.mktemp("selftest") / "demo"))


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Bundle:
    """A copy to be changed."""
    return open_bundle(shutil.copytree(made.path, tmp_path / "bundle"))


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    monkeypatch.delenv("RKEMU_GUESS", raising=False)

    def run(bundle: Bundle, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = cli.main(["run", str(bundle.path), "--selftest", "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    return run


def codes(report: dict[str, Any]) -> list[str]:
    return [problem["code"] for problem in report["problems"]]


@pytest.mark.parametrize("release", ["1.1.4", "1.2.0", "1.2.1b1", "1.2.3", "1.3.0"])
def test_a_good_bundle_is_the_same_on_every_release(made: Bundle, ask: Ask, release: str) -> None:
    code, report = ask(made, "--release", release)
    assert (code, report["verdict"], report["problems"]) == (0, "same", [])
    assert report["emulated"] is True
    assert report["release"] == release
    assert [item["compared"] == item["expected"] >= 8 for item in report["questions"]] == [True] * 3


@pytest.mark.parametrize("release", ["1.2.0", "1.2.3", "1.3.0"])
def test_a_library_that_wraps_token_ids_is_noticed_where_it_can_be_and_answers_are_right(
    made: Bundle, ask: Ask, release: str
) -> None:
    code, report = ask(made, "--release", release, RKEMU_GUESS="tokens-wrapped")
    assert (code, report["verdict"]) == (0, "same")
    assert [("own chat template" in note) for note in report["notes"]] == ([] if release == "1.2.0" else [True])


@pytest.mark.parametrize("guess", ["special-hidden", "context-shifts"])
def test_what_else_a_board_may_do_changes_nothing(made: Bundle, ask: Ask, guess: str) -> None:
    assert ask(made, RKEMU_GUESS=guess)[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("<start_of_turn>model", "<start_of_turn>assistant"),
        lambda text: text.replace("<start_of_turn>", "<start_of_turn><start_of_turn>"),
        lambda text: "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        lambda text: text + "\n\nAnswer:",
    ],
)
def test_a_changed_template(bundle: Bundle, ask: Ask, change: Callable[[str], str]) -> None:
    template = bundle.read_template()
    assert template
    code, report = ask(with_file(bundle, "chat_template.jinja", change(template)))
    assert (code, codes(report)) == (7, ["template"])
    assert [item["as_converted"] for item in report["questions"]] == [False] * 3
    assert [item["differences"] for item in report["questions"][:2]] == [[], []]  # the model is well


def test_a_tokenizer_that_lost_its_merges(bundle: Bundle, ask: Ask) -> None:
    tokenizer = json.loads(bundle.read_tokenizer())
    del tokenizer["model"]["merges"][40:]
    code, report = ask(with_file(bundle, "tokenizer.json", json.dumps(tokenizer)))
    assert (code, codes(report)) == (7, ["template"])


def with_stops(bundle: Bundle, *stops: int) -> Bundle:
    manifest = replace(bundle.manifest, stop_token_ids=stops)
    (bundle.path / "rkedge.yaml").write_text(manifest.to_yaml())
    return Bundle(bundle.path, manifest)


def test_an_end_token_that_neither_bundle_nor_library_knows(bundle: Bundle, ask: Ask) -> None:
    code, report = ask(with_stops(bundle, 1), RKEMU_FAULT="wrong-eos")
    assert (code, codes(report)) == (7, ["end"])
    assert "107" in report["problems"][0]["message"]
    assert {item["runs_on"] for item in report["questions"]} == {True, False}


def test_an_end_token_that_one_of_them_knows(bundle: Bundle, made: Bundle, ask: Ask) -> None:
    assert ask(with_stops(bundle, 1))[0] == 0  # the library ends answers by itself
    assert ask(made, RKEMU_FAULT="wrong-eos")[0] == 0  # RKEdge does


def test_an_answer_that_ends_too_early(bundle: Bundle, ask: Ask) -> None:
    second = bundle.read_selftest().prompts[0].answer[1].ids[0]  # type: ignore[union-attr]
    code, report = ask(with_stops(bundle, 1, 107, second))
    assert (code, codes(report)) == (7, ["end"])
    assert report["questions"][0]["differences"][0]["found"] is None


@pytest.fixture
def spoiled(bundle: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """The bundle with the model file of other weights: `spoiled(change)` gets and returns each matrix."""

    def make(change: Change, seed: int = 0) -> Bundle:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(checkpoint())
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = change(parameter.data)
        folder = shutil.copytree(checkpoint(), tmp_path / "spoiled", ignore=shutil.ignore_patterns("*.safetensors*"))
        model.save_pretrained(folder)
        other = convert(Options(checkpoint=str(folder), output=tmp_path / "other", selftest=False))
        return with_file(bundle, "model.rkemu", other.model.read_bytes())

    return make


def bits(count: int) -> Change:
    """Each row rounded to so many bits."""

    def change(matrix: torch.Tensor) -> torch.Tensor:
        step = matrix.abs().amax(1, keepdim=True) / (2 ** (count - 1) - 1)
        return (matrix / step).round() * step

    return change


def noise(share: float) -> Change:
    return lambda matrix: matrix + torch.randn_like(matrix) * matrix.std() * share


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (bits(8), "same"),
        (bits(6), "same"),
        (noise(0.01), "same"),
        (bits(3), "degraded"),
        (noise(0.3), "degraded"),
        (lambda matrix: torch.randn_like(matrix) * 0.02, "garbage"),
    ],
)
def test_weights_that_are_rounded_spoiled_or_others(
    spoiled: Callable[..., Bundle], ask: Ask, change: Change, expected: str
) -> None:
    code, report = ask(spoiled(change))
    assert report["verdict"] == expected
    assert code == (0 if expected == "same" else 7)


def test_the_model_of_another_bundle(bundle: Bundle, tmp_path: Path, ask: Ask) -> None:
    other = convert(Options(checkpoint=str(checkpoint()), output=tmp_path / "pirate", loras=(lora(),)))
    assert ask(other)[0] == 0
    code, report = ask(with_file(bundle, "model.rkemu", other.model.read_bytes()))
    assert (code, report["verdict"] in ("degraded", "garbage")) == (7, True)


def lora() -> Any:
    from rkconvert.adapters.merged_model import AdapterSource

    return AdapterSource(str(adapter()))


def test_an_adapter_in_its_own_file_and_without_it(tmp_path: Path, ask: Ask) -> None:
    options = Options(checkpoint=str(checkpoint()), output=tmp_path / "both", loras=(lora(),), lora_mode="runtime")
    both = convert(options)
    assert ask(both)[0] == 0
    without = with_file(both, "model_lora.rkemu", None)
    assert ask(without)[0] == 7


def test_a_library_that_says_what_it_likes(made: Bundle, double: Callable[..., Path], ask: Ask) -> None:
    code, report = ask(made, "--library", str(double("1.2.3")), "--force")
    assert (code, codes(report)) == (7, ["garbage"])


@pytest.mark.parametrize("fault", ["old-driver", "segv-token", "bad-model", "segv-init"])
def test_what_fails_before_it_answers_fails_as_everywhere(made: Bundle, ask: Ask, fault: str) -> None:
    code, report = ask(made, RKEMU_FAULT=fault)
    assert code == 7
    assert report["message"]


class Scripted(FakeEngine):
    """Says what a function of the prompt says."""

    def __init__(self, says: Callable[[Request], list[int]], end: FinishReason) -> None:
        super().__init__([], max_context=4096)
        self.says, self.end = says, end

    def generate(self, request: Request, stop: Any = None) -> Iterator[Any]:  # type: ignore[override]
        self.requests.append(request)
        ids = self.says(request)[: request.max_new_tokens]
        ended = len(ids) < request.max_new_tokens
        yield from map(Token, ids)
        yield Finished(self.end if ended else FinishReason.LENGTH, len(request.tokens), len(ids))


@pytest.fixture
def scripted(made: Bundle) -> Iterator[Callable[..., SelfTestResult]]:
    """The self-test of the demo bundle over a scripted engine."""
    with open_model(made, sampling=SamplingOptions(temperature=0)) as model:
        real = model.engine

        def run(says: Callable[[Request], list[int]], end: FinishReason = FinishReason.STOP) -> SelfTestResult:
            model.engine = Scripted(says, end)  # type: ignore[assignment]
            try:
                return run_selftest(model)
            finally:
                model.engine = real

        yield run


@pytest.mark.parametrize("token", [-1, -(2**31), 1024, 2**31 - 1])
def test_ids_that_no_model_has_are_garbage(scripted: Callable[..., SelfTestResult], token: int) -> None:
    found = scripted(lambda request: [token] * request.max_new_tokens)
    assert found.verdict == "garbage"
    assert str(token) in found.problems[0].message


def test_the_same_token_again_and_again(scripted: Callable[..., SelfTestResult]) -> None:
    found = scripted(lambda request: [235] * request.max_new_tokens)
    assert found.verdict == "garbage"
    assert "again and again" in found.problems[0].message
    assert "rkedge doctor" in found.problems[0].hint


def test_a_library_that_says_nothing(scripted: Callable[..., SelfTestResult]) -> None:
    found = scripted(lambda request: [])
    assert found.verdict == "end"
    assert all(question.differences[0].found is None for question in found.questions)


def test_a_library_that_reaches_its_limit_at_once(scripted: Callable[..., SelfTestResult]) -> None:
    found = scripted(lambda request: [], FinishReason.LENGTH)
    assert found.verdict == "end"
    assert all(question.clear for question in found.questions)


def test_a_token_that_the_tokenizer_does_not_have(bundle: Bundle, ask: Ask) -> None:
    text = json.loads((bundle.path / SELFTEST).read_text())
    text["vocabulary"], text["prompts"][1]["tokens"][2] = 1 << 24, (1 << 24) - 1
    code, report = ask(with_file(bundle, SELFTEST, json.dumps(text)))
    assert code == BundleError.exit_code
    assert "16,777,215" in report["message"]


def test_each_position_is_compared_after_a_difference(made: Bundle, scripted: Callable[..., SelfTestResult]) -> None:
    """An engine that is right but for one position, wherever that is, in whatever question."""
    test = made.read_selftest()
    assert test is not None
    for number, question in enumerate(test.prompts):
        for position in range(len(question.ids)):

            def says(request: Request, number: int = number, position: int = position) -> list[int]:
                at = next(i for i, known in enumerate(test.prompts) if starts(request, known.tokens))
                item, done = test.prompts[at], len(request.tokens) - len(test.prompts[at].tokens)
                if at == number and done <= position:
                    return [*item.ids[done:position], 7, 7]
                return item.ids[done : -1 if item.ends else None]

            found = scripted(says)
            (difference,), last = found.questions[number].differences, position == len(question.ids) - 1
            assert difference.position == position + 1
            assert found.questions[number].compared == len(question.ids)
            assert not any(item.differences for at, item in enumerate(found.questions) if at != number)
            expected = "end" if last and question.ends else "degraded"
            assert found.verdict == (expected if difference.clear else "same")


def starts(request: Request, tokens: Sequence[int]) -> bool:
    return list(request.tokens)[: len(tokens)] == list(tokens)


def test_an_old_bundle_says_how_to_make_one(bundle: Bundle, ask: Ask) -> None:
    code, report = ask(with_file(bundle, SELFTEST, None))
    assert code == BundleError.exit_code
    assert "has no self-test" in report["message"]
    assert "rkedge convert" in report["hint"]


def test_another_context_and_another_sampling(made: Bundle, ask: Ask) -> None:
    code, report = ask(made, "--max-context", "48")
    assert code == ContextFullError.exit_code
    assert "--max-context" in report["hint"]
    with open_model(made) as model, pytest.raises(UsageError, match="most likely token"):
        run_selftest(model)


@pytest.mark.parametrize(
    "line", [["Hello"], ["-p", "Hello"], ["--temperature", "1"], ["--system", "x"], ["--stop", "x"]]
)
def test_it_asks_its_own_questions(made: Bundle, ask: Ask, line: list[str]) -> None:
    assert ask(made, *line)[0] == UsageError.exit_code


def test_for_a_person(made: Bundle, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(made.path), "--selftest"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith("same: ")
    assert "nothing of it is an answer about a board" in shown.err
    text = json.loads((bundle.path / SELFTEST).read_text())
    text["prompts"][0]["question"] = "\x1b[2Jclear\nme"
    hostile = with_file(bundle, SELFTEST, json.dumps(text))
    assert cli.main(["run", str(hostile.path), "--selftest"]) == 7  # that question has other tokens
    shown = capsys.readouterr()
    assert "\x1b[2J" not in shown.out
    assert "template: " in shown.out


def test_a_stale_or_changed_file_is_an_error(bundle: Bundle, ask: Ask) -> None:
    (bundle.path / SELFTEST).write_text("{}")
    code, report = ask(bundle)
    assert code == BundleError.exit_code
    assert issubclass(BundleError, RKEdgeError)
    assert report["error"] == "BundleError"
