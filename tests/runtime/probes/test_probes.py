"""Each probe over the emulator, which can be told to answer either way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rkconvert.demo import checkpoint
from rkruntime import SamplingOptions, cli, open_model
from rkruntime.bundle.references import REFERENCES, References, divergence
from rkruntime.errors import BundleError
from rkruntime.probes import FAILED, QUESTIONS, Observation, Trial, answer, is_harmful

RELEASE = "1.3.0"
# The results that the emulator gives, and what makes it give another one.
EITHER_WAY = {
    "template": (
        "plain",
        {
            "RKEMU_GUESS=bos-doubled": "bos",
            "RKEMU_GUESS=tokens-wrapped": "wrapped",
            "RKEMU_GUESS=bos-doubled,tokens-wrapped": "bos",
        },
    ),
    "reuse": ("reused", {"RKEMU_GUESS=prefix-read": "read-again"}),
    "end": ("ends", {"RKEMU_FAULT=wrong-eos": "goes-on"}),
    "end-tokens": ("all", {"RKEMU_FAULT=wrong-eos": "none"}),
    "abort": ("same", {"RKEMU_GUESS=abort-lingers": "other"}),
    "hidden": ("all", {"RKEMU_GUESS=bos-doubled": "other"}),
    "logits": ("all", {"RKEMU_GUESS=logits-last": "last", "RKEMU_GUESS=bos-doubled": "other"}),
    "logits-cap": ("capped", {"RKEMU_GUESS=logits-uncapped": "uncapped"}),
    "attention-cap": ("capped", {"RKEMU_GUESS=attention-uncapped": "uncapped"}),
    "history": ("grows", {"RKEMU_GUESS=history-ignored": "stays"}),
    "logits-cache": ("appended", {"RKEMU_GUESS=logits-apart": "kept", "RKEMU_GUESS=history-ignored": "lost"}),
    "window": ("honoured", {"RKEMU_GUESS=window-ignored": "ignored"}),
    "pause": ("reads-on", {"RKEMU_GUESS=pause-drops": "reads", "RKEMU_GUESS=pause-resumes": FAILED}),
    "pause-cache": ("kept", {"RKEMU_GUESS=pause-drops": "lost"}),
    "prompt-cache": ("same", {"RKEMU_FAULT=no-prompt-cache": FAILED}),
}  # fmt: skip
WAYS = [
    (name, setting, result)
    for name, (usual, others) in EITHER_WAY.items()
    for setting, result in {"RKEMU_GUESS=": usual, **others}.items()
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with larger queries and logits, so that its soft-caps do something."""
    folder = tmp_path_factory.mktemp("probes")
    model = folder / "model"
    shutil.copytree(checkpoint(), model)
    for path in model.glob("*.safetensors"):
        weights = load_file(path)
        for name, values in weights.items():
            if "q_proj" in name:
                weights[name] = values * 6
            if name == "model.norm.weight":
                weights[name] = (1 + values) * 3 - 1
        save_file(weights, path)
    assert cli.main(["convert", str(model), "--release", RELEASE, "-q", "-o", str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "bundle"
    assert cli.main(["convert", str(checkpoint()), "--release", RELEASE, "-q", "-o", str(path)]) == 0
    return path


@pytest.fixture
def ask(bundle: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Observation]]:
    trials = []

    def ask(name: str, setting: str) -> Observation:
        monkeypatch.delenv("RKEMU_GUESS", raising=False)
        variable, _, value = setting.partition("=")
        monkeypatch.setenv(variable, value)
        which = bundle if name.endswith("-cap") else plain
        trials.append(Trial(lambda: open_model(which, sampling=SamplingOptions(temperature=0))))
        return answer(name, trials[-1])

    yield ask
    for trial in trials:
        trial.close()


@pytest.mark.parametrize(("name", "setting", "result"), WAYS)
def test_each_answer_is_seen(
    ask: Callable[[str, str], Observation], name: str, setting: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKEMU_TOKEN_US", "2000")  # so that an answer goes on when it is aborted
    found = ask(name, setting)
    assert found.result == result, found
    assert found.says.endswith(".")
    json.dumps(dict(found.facts), default=str)


@pytest.mark.parametrize("name", ["end-tokens", "logits-cap", "attention-cap"])
def test_a_library_with_other_rows_of_logits_has_not_failed(ask: Callable[[str, str], Observation], name: str) -> None:
    """The question about logits says what is wrong with it; a library that returns the last row alone is in order."""
    for guess in ("logits-last", "bos-doubled"):
        found = ask(name, f"RKEMU_GUESS={guess}")
        assert (found.result, found.says.partition(":")[0]) == ("", "Not answered")


def test_each_probe_is_tried_with_an_answer_and_another_one() -> None:
    assert EITHER_WAY.keys() == QUESTIONS.keys()
    assert all(others for _, others in EITHER_WAY.values())


def test_each_probe_says_what_its_results_mean() -> None:
    for name, setting, result in WAYS:
        said = QUESTIONS[name].answer.__doc__ or ""
        if result != FAILED:
            documented = said + (QUESTIONS["logits-cap"].answer.__doc__ or "") * name.endswith("-cap")
            assert f"`{result}`" in documented, (name, setting)
        for harmful in QUESTIONS[name].harmful:
            assert is_harmful(name, harmful)


def test_an_older_release_answers_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RKEMU_GUESS", raising=False)
    assert cli.main(["convert", str(checkpoint()), "--release", "1.1.4", "-q", "-o", str(tmp_path / "b")]) == 0
    trial = Trial(lambda: open_model(tmp_path / "b", sampling=SamplingOptions(temperature=0)))
    try:
        found = {name: answer(name, trial) for name in ("window", "template", "logits", "logits-cache")}
    finally:
        trial.close()
    assert found["window"].result == "honoured"
    assert [found[name].result for name in ("template", "logits", "logits-cache")] == ["", "", ""]


# References


@given(st.lists(st.tuples(*[st.floats(-40, 40)] * 2), min_size=2, max_size=20))
def test_the_divergence_is_torch_s(pairs: list[tuple[float, float]]) -> None:
    true, found = (list(column) for column in zip(*pairs, strict=True))
    ours, theirs = (torch.log_softmax(torch.tensor(row, dtype=torch.float64), -1) for row in (true, found))
    expected = float(torch.nn.functional.kl_div(theirs, ours, reduction="sum", log_target=True))
    assert divergence(true, found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "rkedge-references/2"},
        {"window": {"window": 0, "tokens": [1], "forks": []}},
        {"window": {"window": 4, "tokens": [1], "forks": [{"length": 2, "windowed": 1, "whole": 2, "margin": 1}]}},
        {"window": {"window": 4, "tokens": [1], "forks": []}},
        {"window": {"window": 4, "tokens": [-1], "forks": [{"length": 1, "windowed": 1, "whole": 2, "margin": 1}]}},
        {"caps": {"tokens": [1], "rows": []}},
        {"caps": {"tokens": [1], "rows": [{"at": 1, "ids": [1, 2], "capped": [1, 2], "logits_uncapped": [1, 2],
                                           "attention_uncapped": [1, 2]}]}},
        {"caps": {"tokens": [1], "rows": [{"at": 0, "ids": [1, 2], "capped": [1], "logits_uncapped": [1, 2],
                                           "attention_uncapped": [1, 2]}]}},
        {"caps": {"tokens": [1], "rows": [{"at": 0, "ids": [1, 1], "capped": [1, 2], "logits_uncapped": [1, 2],
                                           "attention_uncapped": [1, 2]}]}},
        {"more": 1},
    ],
)  # fmt: skip
def test_references_are_a_stranger_s(plain: Path, change: dict[str, object]) -> None:
    content = json.loads((plain / REFERENCES).read_text())
    References.from_json(json.dumps(content).encode(), "x")
    with pytest.raises(BundleError):
        References.from_json(json.dumps({**content, **change}).encode(), "x")


@pytest.mark.parametrize("data", [b"", b"[", b"[" * 10_000, b"{}", b"7", b'{"schema": NaN}'])
def test_what_is_not_json(data: bytes) -> None:
    with pytest.raises(BundleError):
        References.from_json(data, "x")
