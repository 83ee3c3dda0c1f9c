"""What `import rkruntime` gives: the names, what they do with the demo model, and the programs of the documentation."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rkruntime
from rkconvert.demo import questions
from rkruntime.errors import ContextFullError, RKEdgeError, RunError, UsageError, WorkerCrashedError
from rkruntime.testing import FakeEngine, fake_model

from .conftest import with_file
from .engine.conftest import bundle  # noqa: F401  # a fixture

DOCS = Path(__file__).parents[2] / "docs"
ROWS = questions()[:3]


def test_the_names() -> None:
    assert rkruntime.__all__ == sorted(rkruntime.__all__)
    assert rkruntime.__all__ == [
        *("Answer", "Bundle", "Chat", "Conversation", "Diagnosis", "Engine", "Finding", "FinishReason", "Finished"),
        *("Identity", "LoadOptions", "Lora", "Manifest", "Message", "Model", "ModelInfo", "Perf", "Preflight"),
        *("RKEdgeError", "Request", "RuntimeOptions", "Sampling", "SamplingOptions", "SelfTestResult", "Stop", "Token"),
        *("diagnose", "identify", "open_bundle", "open_model", "preflight", "run_selftest"),
    ]
    assert all(getattr(rkruntime, name).__name__ == name for name in rkruntime.__all__)
    assert dir(rkruntime) == rkruntime.__all__
    with pytest.raises(AttributeError, match="'rkruntime' has no attribute 'engines'"):
        rkruntime.engines  # noqa: B018


def test_the_import_brings_nothing() -> None:
    code = "import sys; old = set(sys.modules); import rkruntime; print(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"numpy", "click", "yaml", "tokenizers", "jinja2", "rich"}
    assert "rkruntime.engine" not in done.stdout.split()


@pytest.fixture(scope="module")
def model(bundle: rkruntime.Bundle) -> Iterator[rkruntime.Model]:  # noqa: F811
    with rkruntime.open_model(bundle, sampling=rkruntime.SamplingOptions(temperature=0)) as model:
        yield model


def test_asking_streaming_and_asyncio_agree(model: rkruntime.Model) -> None:
    assert model.engine.info.emulated
    for row in ROWS:
        answer = model.ask(row.question)
        assert answer.text == row.answer
        assert answer.reason is rkruntime.FinishReason.STOP
        *pieces, last = model.stream([rkruntime.Message("user", row.question)])
        assert last == answer or isinstance(last, rkruntime.Answer)
        assert "".join(map(str, pieces)) == row.answer

        async def gather(question: str = row.question) -> str:
            return "".join([piece async for piece in model.astream(question) if isinstance(piece, str)])

        assert asyncio.run(gather()) == row.answer
    assert len(model.ask(ROWS[0].question, max_new_tokens=2).tokens) == 2


def test_an_iterator_that_is_closed_ends_the_run(model: rkruntime.Model) -> None:
    pieces = model.stream(ROWS[0].question)
    next(pieces)
    pieces.close()
    assert model.ask(ROWS[1].question).text == ROWS[1].answer


def test_a_chat_remembers_and_drops() -> None:
    model = fake_model("one", "two", "three", max_context=96)
    chat = model.chat("be brief")
    assert [chat.ask("a").text, chat.ask("b").text] == ["one", "two"]
    roles = [message.role for message in chat.conversation.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    with pytest.raises(ContextFullError):
        chat.ask("c" * 40)
    assert len(chat.conversation.messages) == 4
    dropping = model.chat(drop_oldest=True)
    dropping.conversation.messages += chat.conversation.messages
    assert dropping.ask("c" * 40).text == "three"
    assert dropping.dropped > 0


def test_a_chat_keeps_what_was_shown() -> None:
    """Not what was generated behind a stop string, nor half of a character."""
    model = fake_model("one two", "né", [0xC3])
    chat = model.chat()
    shown = [chat.ask("a", stop=[" tw"]).text, chat.ask("b").text, chat.ask("c").text]
    assert shown == ["one", "né", "\ufffd"]
    assert [message.tokens for message in chat.conversation.messages[1::2]] == [(*b"one",), (*"né".encode(),), None]


def test_a_turn_whose_worker_died_is_not_kept() -> None:
    model = fake_model([ord("h"), WorkerCrashedError("gone")])
    chat = model.chat()
    with pytest.raises(WorkerCrashedError):
        chat.ask("hello?")
    assert chat.conversation.messages == []
    assert isinstance(model.engine, FakeEngine)
    model.close()
    assert not model.engine.alive


@pytest.mark.parametrize("limit", [0, -5, 1.5, True, "3"])
def test_what_is_no_limit_is_refused_before_the_run(limit: Any) -> None:
    model = fake_model("hello")
    for ask in (model.ask, model.chat().ask):
        with pytest.raises(UsageError, match="max_new_tokens"):
            ask("hi", max_new_tokens=limit)
    assert model.ask("hi").text == "hello"


def test_the_limit_that_a_model_was_opened_with(bundle: rkruntime.Bundle) -> None:  # noqa: F811
    sampling = rkruntime.SamplingOptions(temperature=0, max_new_tokens=3)
    with rkruntime.open_model(bundle, sampling=sampling) as model:
        assert len(model.ask(ROWS[0].question).tokens) == 3
        assert model.chat().ask(ROWS[0].question).reason is rkruntime.FinishReason.LENGTH
        assert len(model.ask(ROWS[0].question, max_new_tokens=4).tokens) == 4
    for call in (model.ask, model.request, model.chat().ask):
        with pytest.raises(RunError, match="closed"):
            call("hi")


def test_one_stop_text_is_not_its_letters() -> None:
    assert fake_model("one tint two").ask("?", stop="ti").text == "one "


def test_a_turn_is_kept_when_its_answer_is_there() -> None:
    chat = fake_model("one").chat()
    next(piece for piece in chat.stream("a") if isinstance(piece, rkruntime.Answer))
    assert [message.content for message in chat.conversation.messages] == ["a", "one"]


def test_the_fake_ends_as_a_real_one_does() -> None:
    model = fake_model([WorkerCrashedError("gone")], "not reached")
    with pytest.raises(WorkerCrashedError):
        model.ask("?")
    with pytest.raises(RunError):
        model.ask("?")
    assert fake_model([104, 105, 258, 106]).ask("?").text == "hi"
    with pytest.raises(AssertionError, match="no answers left"):
        fake_model().ask("?")


def test_the_page_names_what_there_is() -> None:
    page = (DOCS / "python.md").read_text()
    named = set(re.findall(r"\b[A-Za-z_]+\b", page))
    assert {name for name in rkruntime.__all__ if name not in named} <= {"Conversation", "Identity"}
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    exec(blocks[1], {})


def test_the_pages_first_program(bundle: rkruntime.Bundle, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    code = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S)[0]
    exec(code.replace('"my-bundle"', repr(str(bundle.path))), {})
    assert len(capsys.readouterr().out) > 20


def example(name: str, *words: object) -> list[str]:
    return [sys.executable, str(DOCS / "examples" / f"{name}.py"), *map(str, words)]


def test_the_bot_and_the_batch(bundle: rkruntime.Bundle) -> None:  # noqa: F811
    lines = "".join(f"{row.question}\n" for row in ROWS)
    done = subprocess.run(example("bot", bundle.path), input=lines + "\n", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == len(ROWS) + 1
    lines = f"\n{lines}\n   \n"
    done = subprocess.run(example("batch", bundle.path), input=lines, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["question"] for line in done.stdout.splitlines()] == [row.question for row in ROWS]


def test_the_service(bundle: rkruntime.Bundle, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "socket"
    with subprocess.Popen(example("service", bundle.path, path), stderr=subprocess.PIPE) as process:
        try:
            for _ in range(600):
                if path.exists():
                    break
                assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
                time.sleep(0.1)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                client.connect(os.fspath(path))
                client.sendall(f"{ROWS[0].question}\n".encode())
                client.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: client.recv(4096), b""))
        finally:
            process.terminate()
    assert len(answer) > 2


def test_a_run_that_fails_forgets_no_turn() -> None:
    """The context is full, so that each question drops turns; only an answer makes that last."""
    model = fake_model("one", "two", [*b"th", RunError("no")], "four", max_context=120)
    chat = model.chat(drop_oldest=True)
    for text in ("a" * 30, "b" * 30):
        chat.ask(text)
    before = chat.conversation.as_dict()
    with pytest.raises(RunError):
        chat.ask("c" * 40)
    assert chat.dropped
    assert chat.conversation.as_dict() == before
    chat.ask("c" * 40)
    assert len(chat.conversation.messages) < len(before["messages"]) + 2


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", True, 1e30, [1]])
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "repeat_penalty", "max_new_tokens", "max_context"])
def test_options_that_nothing_can_have_are_refused(name: str, value: Any) -> None:
    kind = rkruntime.RuntimeOptions if name == "max_context" else rkruntime.SamplingOptions
    with pytest.raises(UsageError, match=f"^{name} is"):
        kind(**{name: value})


class Named:
    """A path that is neither a text nor a pathlib.Path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("kind", [str, Named])
def test_paths_are_texts_or_pathlike(bundle: rkruntime.Bundle, tmp_path: Path, kind: Any) -> None:  # noqa: F811
    assert rkruntime.open_bundle(kind(bundle.path)).manifest == bundle.manifest
    talk = fake_model("Yes.").chat()
    talk.ask("Is it?")
    talk.conversation.save(kind(tmp_path / "talk.json"))
    talk.conversation.load(kind(tmp_path / "talk.json"))
    with rkruntime.open_model(kind(bundle.path)) as model:
        library, file = model.engine.options.library, bundle.model
    assert rkruntime.identify(kind(library)) == rkruntime.identify(library)
    options = rkruntime.RuntimeOptions(library=kind(library))
    with rkruntime.open_model(bundle, options) as model:
        assert model.engine.options.library == library
    load = rkruntime.LoadOptions(kind(library), kind(file), loras=[rkruntime.Lora("a", kind(file))])
    assert (load.library, load.model, load.loras[0].path) == (library, file, file)


def test_an_argument_that_is_not_there_is_a_type_error() -> None:
    """At once: neither the bundle nor the library is looked for."""
    for name in ("load_timeot", "max_context", "timeouts"):
        with pytest.raises(TypeError, match=name):
            rkruntime.open_model("no such bundle", **{name: 1})  # type: ignore[arg-type]


def test_nothing_starts_for_a_model_that_was_closed(bundle: rkruntime.Bundle) -> None:  # noqa: F811
    model = rkruntime.open_model(bundle)
    chat = model.chat()
    model.close()
    model.close()
    messages = [rkruntime.Message("user", "Hi")]
    for ask in (
        lambda: model.ask("Hi"),
        lambda: chat.ask("Hi"),
        lambda: chat.conversation.prompt("Hi", 512),
        lambda: chat.conversation.restore(chat.conversation.as_dict()),
        lambda: model.prompts.prompt(messages, 512),
        lambda: model.prompts.encode("Hi", 512),
    ):
        with pytest.raises(RunError, match="is closed"):
            ask()
    prompts: Any = model.prompts
    assert prompts._child.pid is None


def test_preflight_as_documented(bundle: rkruntime.Bundle) -> None:  # noqa: F811
    assert isinstance(rkruntime.preflight(bundle.known), rkruntime.Preflight)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[rkruntime.Model]:
    """What `open_model` gives in turn: the library crashes over the second question."""
    given = [fake_model("one", [*b"tw", WorkerCrashedError("gone")]), fake_model("three", "four")]
    rest = list(given)
    monkeypatch.setattr(rkruntime, "open_model", lambda _: rest.pop(0))
    return given


@pytest.mark.parametrize("name", ["bot", "batch"])
def test_a_program_goes_on_when_the_library_crashed(
    name: str, models: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name, "my-bundle"])
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\nthird\n"))
    runpy.run_path(str(DOCS / "examples" / f"{name}.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert "one" in out
    assert "three" in out
    assert "gone" in out + err
    assert all(model.engine.closed for model in models)
    if name == "bot":  # The turns before the crash are in the next prompt, and the one that failed is not.
        prompt = models[1].prompts.vocabulary.decode(models[1].engine.requests[0].tokens)
        assert "first" in prompt
        assert "second" not in prompt


def test_the_service_goes_on_and_nobody_holds_it_up(models: list[Any], tmp_path: Path) -> None:
    main = runpy.run_path(str(DOCS / "examples" / "service.py"))["main"]

    async def ask(*questions: str) -> str:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        writer.write("".join(f"{question}\n" for question in questions).encode())
        writer.write_eof()
        said = (await asyncio.wait_for(reader.read(), 20)).decode()
        writer.close()
        return said

    async def everybody() -> list[str]:
        served = asyncio.create_task(main("my-bundle", str(tmp_path / "socket")))
        while not (tmp_path / "socket").exists():
            await asyncio.sleep(0.01)
        said = [await ask("", "first", " "), await ask("second"), await ask("third")]
        served.cancel()
        await asyncio.gather(served, return_exceptions=True)
        return said

    assert asyncio.run(everybody()) == ["one\n", "tw", "three\n"]
    assert all(model.engine.closed for model in models)


def test_a_file_that_the_manifest_does_not_list_is_told(bundle: rkruntime.Bundle, tmp_path: Path) -> None:  # noqa: F811
    """An adapter that somebody took out of the manifest: the base answers, and says so."""
    shutil.copytree(bundle.path, tmp_path / "copy")
    (tmp_path / "copy" / "model_lora.rkemu").write_bytes(b"anything")
    (tmp_path / "copy" / "notes.txt").write_bytes(b"anything")
    left_out = rkruntime.open_bundle(tmp_path / "copy")
    for name in ("chat_template.jinja", "generation_config.json"):
        left_out = with_file(left_out, name, None)
        (left_out.path / name).write_text("{}")
    assert left_out.unlisted == ["chat_template.jinja", "generation_config.json", "model_lora.rkemu"]
    found: list[rkruntime.Finding] = []
    with rkruntime.open_model(tmp_path / "copy", finding=found.append):
        assert [one.level for one in found if "model_lora.rkemu" in one.message] == ["warning"]


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"\0" * 4096], ids=["empty", "junk", "zeros"])
def test_a_junk_adapter_is_not_called_a_junk_model(
    model: rkruntime.Model,
    bundle: rkruntime.Bundle,  # noqa: F811
    tmp_path: Path,
    content: bytes,
) -> None:
    (tmp_path / "junk.rkemu").write_bytes(content)
    adapter = rkruntime.Lora("junk", tmp_path / "junk.rkemu")
    options = rkruntime.LoadOptions(model.engine.options.library, bundle.model, loras=[adapter], lora="junk")
    with pytest.raises(RKEdgeError) as caught:
        rkruntime.Engine.load(options)
    assert "LoRA adapter" in caught.value.hint
    assert "model file is not" not in caught.value.hint
