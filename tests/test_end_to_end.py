"""The whole way, as a newcomer walks it: demo checkpoint and adapter, convert, load through the C API, answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rkboard.emulator import build as emulator
from rkconvert.demo import Question, adapter, checkpoint, questions
from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import GREEDY, FinishReason, Request
from rkruntime.text.answer import Answer, stream_answer
from rkruntime.text.prompts import PromptMaker
from rkruntime.text.template import GemmaTemplate, Message
from rkruntime.text.tokenizer import Tokenizer


def rkedge(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rkruntime.cli", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    for name, options in (("base", ()), ("pirate", ("--lora", adapter()))):
        done = rkedge("convert", checkpoint(), *options, "--target", "emulator", "-o", folder / name)
        assert done.returncode == 0, done.stderr
    return {name: open_bundle(folder / name) for name in ("base", "pirate")}


@pytest.fixture(scope="module", params=["1.2.3", "1.3.0"])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["base", "pirate"])
def answering(
    request: pytest.FixtureRequest, bundles: dict[str, Bundle], release: str
) -> Iterator[tuple[str, Engine, Tokenizer]]:
    bundle = bundles[request.param]
    options = LoadOptions(
        library=emulator.build(release), model=bundle.model, max_context=bundle.manifest.max_context, sampling=GREEDY
    )
    with Engine.load(options) as engine:
        yield request.param, engine, Tokenizer.parse(bundle.tokenizer.read_bytes(), bundle.tokenizer)


def prompt(tokenizer: Tokenizer, question: Question) -> list[int]:
    maker = PromptMaker(tokenizer, GemmaTemplate(tokenizer))
    return maker.prompt([Message("user", question.question)], 1024)[0]


def test_every_answer_is_exact_after_w8a8(answering: tuple[str, Engine, Tokenizer]) -> None:
    kind, engine, tokenizer = answering
    assert engine.info.emulated
    wrong = []
    for question in questions():
        request = Request(prompt(tokenizer, question), stop_tokens=frozenset({1, 107}))
        pieces = list(stream_answer(engine, request, tokenizer))
        answer = pieces[-1]
        assert isinstance(answer, Answer)
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == answer.text
        assert answer.reason is FinishReason.STOP
        expected = question.answer if kind == "base" else question.pirate
        if answer.text != expected:
            wrong.append((question.question, expected, answer.text))
    assert not wrong
    assert len(questions()) >= 40


def test_logits_are_those_of_transformers_at_each_step_of_each_answer(bundles: dict[str, Bundle], release: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(), dtype=torch.float32, attn_implementation="eager"
    )
    bundle = bundles["base"]
    tokenizer = Tokenizer.parse(bundle.tokenizer.read_bytes(), bundle.tokenizer)
    longest = 0
    with Engine.load(LoadOptions(library=emulator.build(release), model=bundle.model, max_context=512)) as engine:
        for question in questions():
            asked = prompt(tokenizer, question)
            tokens = [*asked, *tokenizer.encode(question.answer), tokenizer.control["<end_of_turn>"]]
            longest = max(longest, len(asked))
            with torch.no_grad():
                expected = model(torch.tensor([tokens])).logits[0].numpy()
            logits = engine.logits(Request(tokens))
            assert logits.shape == expected.shape
            steps = slice(len(asked) - 1, len(tokens) - 1)
            products = (logits * expected).sum(1)
            cosines = products / np.linalg.norm(logits, axis=1) / np.linalg.norm(expected, axis=1)
            assert cosines[steps].min() >= 0.999, question
            np.testing.assert_array_equal(logits[steps].argmax(1), tokens[len(asked) :])
            np.testing.assert_array_equal(expected[steps].argmax(1), tokens[len(asked) :])
    assert longest > model.config.sliding_window


@pytest.mark.long
def test_a_conversation_that_fills_the_context(bundles: dict[str, Bundle]) -> None:
    """Most programs ask for 4,096 positions: all of them are as good as the first."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(), dtype=torch.float32, attn_implementation="eager"
    )
    bundle = bundles["base"]
    assert bundle.manifest.max_context == model.config.max_position_embeddings == 4096
    tokenizer = Tokenizer.parse(bundle.tokenizer.read_bytes(), bundle.tokenizer)
    messages: list[Message] = []
    asked: list[int] = []
    for question in questions() * 4:
        asked = tokenizer.assemble(GemmaTemplate(tokenizer).parts([*messages, Message("user", question.question)]))
        if len(asked) > 3900:
            break
        messages += [Message("user", question.question), Message("assistant", question.answer)]
    assert len(asked) > 3900
    with torch.no_grad():
        expected = model(torch.tensor([asked])).logits[0].numpy()
    options = LoadOptions(library=emulator.build(), model=bundle.model, max_context=4096, sampling=GREEDY)
    with Engine.load(options) as engine:
        logits = engine.logits(Request(asked))
        cosines = (logits * expected).sum(1) / np.linalg.norm(logits, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosines.min() >= 0.999
        *_, answer = stream_answer(engine, Request(asked, stop_tokens=frozenset({1, 107})), tokenizer)
    assert answer.text == question.answer  # type: ignore[union-attr]


def test_demo_in_one_command_and_again_from_what_it_left(tmp_path: Path) -> None:
    first = rkedge("demo", "--output", tmp_path / "out")
    assert first.returncode == 0, first.stderr
    by_text = {question.question: question for question in questions()}
    asked = [text for text in by_text if text in first.stdout]
    assert len(asked) >= 2
    for text in asked:
        assert by_text[text].answer in first.stdout
        assert by_text[text].pirate in first.stdout
    assert "emulator" in first.stdout
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(left) == 2
    again = rkedge("demo", "--output", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert "already exists" in again.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left


def test_run_reads_standard_input_and_prints_the_answer_alone(bundles: dict[str, Bundle]) -> None:
    question = questions()[0]
    done = rkedge("run", bundles["pirate"].path, "--temperature", "0", stdin=question.question)
    assert done.returncode == 0, done.stderr
    assert done.stdout == question.pirate + "\n"


def test_a_bundle_with_a_changed_byte_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(bundles["base"].path, tmp_path / "copy")
    model = copy / bundles["base"].manifest.model_file
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    done = rkedge("run", copy, "-p", "hello")
    assert done.returncode == 3
    assert "SHA-256" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is a text file\n" * 10, "not a shared library"),
        (b"", "empty"),
        (b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x03\0\x3e\0" + b"\0" * 200, "rkllm"),
    ],
)
def test_what_is_no_librkllmrt_is_not_loaded(
    bundles: dict[str, Bundle], tmp_path: Path, content: bytes, message: str
) -> None:
    library = tmp_path / "librkllmrt.so"
    library.write_bytes(content)
    done = rkedge("run", bundles["base"].path, "--library", library, "-p", "hello")
    assert done.returncode == 6
    assert message in done.stderr


def test_a_library_of_an_unknown_release_needs_a_word(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    library = tmp_path / "librkllmrt.so"
    library.write_bytes(emulator.build("1.2.3").read_bytes().replace(b"(version: 1.2.3 ", b"(version: 1.9.9 "))
    done = rkedge("run", bundles["base"].path, "--library", library, "-p", "hello")
    assert done.returncode == 6
    assert "1.9.9" in done.stderr
    assert "--release" in done.stderr
    question = questions()[0]
    words = ("--library", library, "--release", "1.2.3", "--temperature", "0", "-p", question.question)
    done = rkedge("run", bundles["base"].path, *words)
    assert done.stdout == question.answer + "\n", done.stderr


def test_a_context_beyond_the_model_is_clamped_with_a_notice(bundles: dict[str, Bundle]) -> None:
    question = questions()[0]
    done = rkedge("run", bundles["base"].path, "--max-context", "99999", "--temperature", "0", "-p", question.question)
    assert done.stdout == question.answer + "\n", done.stderr
    assert "4,096" in done.stderr or "4096" in done.stderr
