"""`report/selftest.json` as a stranger may have written it: what is wrong is a BundleError, and nothing else."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.conftest import with_file

from rkruntime.bundle.manifest import Bundle, FileRecord
from rkruntime.bundle.selftest import MAX_SELFTEST, Expected, Question, SelfTest
from rkruntime.errors import BundleError

NAME = "report/selftest.json"


def some(seed: int) -> SelfTest:
    """Any valid contents."""
    chosen = random.Random(seed)
    vocabulary = chosen.choice([16, 1024, 256_000, 1 << 24])

    def step() -> Expected:
        count = chosen.randint(2, 16)
        gaps = sorted([0.0, *(round(chosen.expovariate(0.2), 4) for _ in range(count - 1))])
        ids = tuple(chosen.sample(range(vocabulary), count))
        return Expected(ids, tuple(gaps), chosen.randrange(vocabulary), chosen.random())

    questions = [
        Question(
            chosen.choice(["Hello", "", "为什么？", "\x1b[2J", "x" * 1024]),
            tuple(chosen.choices(range(vocabulary), k=chosen.choice([1, 30, 1024]))),
            tuple(step() for _ in range(chosen.choice([1, 12, 64]))),
            chosen.random() < 0.5,
        )
        for _ in range(chosen.randint(1, 8))
    ]
    return SelfTest(vocabulary, "w8a8", chosen.random(), tuple(questions))


@pytest.fixture
def folder(fake_bundle: Bundle) -> Bundle:
    (fake_bundle.path / "report").mkdir()
    return fake_bundle


@pytest.mark.parametrize("seed", range(20))
def test_what_was_written_comes_back(folder: Bundle, seed: int) -> None:
    test = some(seed)
    found = with_file(folder, NAME, json.dumps(test.as_dict())).read_selftest()
    assert found == test
    assert found is not None
    for question in found.prompts:
        for step in question.answer:
            assert step.gap(step.ids[0]) == 0
            assert step.gap(-1) == step.gap() == step.behind[-1]
            assert step.gap(*step.ids[1:]) == step.margin == step.behind[1]


PLAIN = replace(some(1), prompts=some(1).prompts[:1]).as_dict()
STEP = {"ids": [1, 2], "behind": [0.0, 1.0], "rounded_id": 1, "rounded_margin": 1.0}
PROMPT = {"question": "Hello", "tokens": [2], "answer": [STEP], "ends": True}


def of(**changes: Any) -> dict[str, Any]:
    return {**PLAIN, "prompts": [PROMPT], **changes}


def prompt(**changes: Any) -> dict[str, Any]:
    return of(prompts=[{**PROMPT, **changes}])


def step(**changes: Any) -> dict[str, Any]:
    return prompt(answer=[{**STEP, **changes}])


def test_the_plain_one_is_right(folder: Bundle) -> None:
    assert with_file(folder, NAME, json.dumps(of())).read_selftest() is not None


HOSTILE: dict[str, Any] = {
    "no object": [],
    "another version": of(schema="rkedge-selftest/2"),
    "an unknown key": of(more=1),
    "a missing key": {key: value for key, value in of().items() if key != "rounding"},
    "no prompts": of(prompts=[]),
    "too many prompts": of(prompts=[PROMPT] * 9),
    "prompts as a mapping": of(prompts={"0": PROMPT}),
    "a vocabulary of nothing": of(vocabulary=0),
    "a huge vocabulary": of(vocabulary=1 << 40),
    "a vocabulary as a truth": of(vocabulary=True),
    "rounding below 0": of(rounding=-1),
    "rounding that is huge": of(rounding=1e300),
    "no tokens": prompt(tokens=[]),
    "too many tokens": prompt(tokens=[2] * 1025),
    "a token below 0": prompt(tokens=[-1]),
    "a token beyond the vocabulary": of(vocabulary=2),
    "a token as a number with a point": prompt(tokens=[2.0]),
    "a nested token": prompt(tokens=[[2]]),
    "a long question": prompt(question="x" * 1025),
    "no answer": prompt(answer=[]),
    "a long answer": prompt(answer=[STEP] * 65),
    "an end that is no truth": prompt(ends=1),
    "one candidate": step(ids=[1], behind=[0.0]),
    "too many candidates": step(ids=list(range(17)), behind=[0.0] * 17),
    "fewer gaps than candidates": step(behind=[0.0]),
    "the same candidate twice": step(ids=[1, 1]),
    "gaps that fall": step(ids=[1, 2, 3], behind=[0.0, 2.0, 1.0]),
    "a first gap": step(behind=[0.5, 1.0]),
    "a gap below 0": step(behind=[-1.0, 0.0]),
    "a candidate beyond the vocabulary": step(ids=[1, 1 << 24]),
    "a text for a gap": step(behind=[0.0, "1"]),
}
RAW: dict[str, bytes] = {
    "empty": b"",
    "cut": json.dumps(of()).encode()[:-3],
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "deep within": b'{"schema": "rkedge-selftest/1", "prompts": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "NaN": json.dumps(of()).replace(str(PLAIN["rounding"]), "NaN").encode(),
    "infinity": json.dumps(step()).replace("[0.0, 1.0]", "[0.0, Infinity]").encode(),
    "a number without end": json.dumps(of()).replace(str(PLAIN["vocabulary"]), "9" * 9000).encode(),
}


@pytest.mark.parametrize("name", [*HOSTILE, *RAW])
def test_what_is_wrong_is_refused_and_named(folder: Bundle, name: str) -> None:
    content = RAW[name] if name in RAW else json.dumps(HOSTILE[name])
    with pytest.raises(BundleError) as caught:
        with_file(folder, NAME, content).read_selftest()
    assert "selftest.json" in caught.value.message
    assert len(caught.value.message) < 1000
    assert caught.value.hint


def test_one_byte_changed_anywhere_is_an_error_or_harmless(folder: Bundle) -> None:
    """With a manifest that says so: nothing else than a BundleError comes of it."""
    good, chosen = json.dumps(some(3).as_dict()).encode(), random.Random(3)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        data[chosen.randrange(len(data))] = chosen.randrange(256)
        try:
            SelfTest.from_json(bytes(data), NAME)
        except BundleError:
            refused += 1
    assert 50 < refused < 300


def test_it_is_hashed_and_bounded_like_every_file(folder: Bundle) -> None:
    bundle = with_file(folder, NAME, json.dumps(of()))
    (bundle.path / NAME).write_text(json.dumps(of(rounding=1.0)))
    with pytest.raises(BundleError, match="changed or damaged"):
        bundle.read_selftest()
    large = with_file(folder, NAME, " " * (MAX_SELFTEST + 1))
    with pytest.raises(BundleError, match="MiB"):
        large.read_selftest()


@pytest.mark.parametrize("place", ["missing", "folder", "outside"])
def test_a_file_that_is_not_there(folder: Bundle, tmp_path: Path, place: str) -> None:
    bundle = with_file(folder, NAME, json.dumps(of()))
    path: Path = bundle.path / NAME
    content = path.read_bytes()
    path.unlink()
    if place == "folder":
        path.mkdir()
    if place == "outside":
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError):
        bundle.read_selftest()


def test_a_bundle_without_one(folder: Bundle) -> None:
    assert folder.read_selftest() is None
    listed = replace(folder.manifest, files={**folder.manifest.files, NAME: FileRecord(1, "0" * 64)})
    with pytest.raises(BundleError):
        Bundle(folder.path, listed).read_selftest()
