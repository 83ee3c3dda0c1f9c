"""Files of KV caches are a help and never a condition: whatever is wrong with them, answers are as without."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rkconvert.demo import questions
from rkruntime.engine.generation import Finished, FinishReason, Request, Token
from rkruntime.errors import RunError, WorkerCrashedError
from rkruntime.serve.prompt_cache import PromptCaches
from rkruntime.testing import FakeEngine

QA = {row.question: row.answer for row in list(questions())[:8]}
SETTINGS = "prompt_cache: {{folder: {folder}, max_mb: 50, min_tokens: 4}}"
WARNING = "no prompt cache files"


def _a_file(folder: Path) -> None:
    folder.write_text("")


def _below_a_file(folder: Path) -> None:
    folder.parent.rmdir()
    folder.parent.write_text("")


def _a_loop(folder: Path) -> None:
    folder.symlink_to(folder)


def _nowhere(folder: Path) -> None:
    folder.symlink_to("/proc/none/at/all")


def _on_proc(folder: Path) -> None:
    folder.symlink_to("/proc/self")


@pytest.mark.parametrize("make", [_a_file, _below_a_file, _a_loop, _nowhere, _on_proc])
def test_a_folder_that_is_none(start_daemon: Callable[..., Any], tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "x" / "prompts"
    folder.parent.mkdir()
    make(folder)
    daemon = start_daemon(SETTINGS.format(folder=folder), port=False)
    for _ in range(2):
        assert [daemon.ask(question) for question in QA] == list(QA.values())
    assert daemon.log.count(WARNING) == 1


@pytest.mark.parametrize("what", ["too small", "full", "without inodes", "read-only"])
def test_a_disk_without_room(start_daemon: Callable[..., Any], small_disk: Path, what: str) -> None:
    folder = small_disk / "prompts"
    folder.mkdir()
    if what == "full":
        (small_disk / "fill").write_bytes(bytes(60 << 10))
    elif what == "without inodes":
        for number in range(17):
            (small_disk / str(number)).touch()
    elif what == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    daemon = start_daemon(SETTINGS.format(folder=folder), port=False)
    for _ in range(2):
        assert [daemon.ask(question) for question in QA] == list(QA.values())
    assert daemon.log.count(WARNING) == 1
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_files_that_vanish_or_are_no_caches(start_daemon: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    daemon = start_daemon(SETTINGS.format(folder=folder), port=False)
    assert [daemon.ask(question) for question in QA] == list(QA.values())
    kept = sorted(folder.glob("*.kv"))
    assert len(kept) > 4
    kept[0].unlink()
    kept[1].write_bytes(b"")
    kept[2].write_bytes(kept[2].read_bytes()[:-100])
    kept[3].unlink()
    kept[3].mkdir()
    for path in folder.glob("*.json"):
        path.write_text("{")
    assert [daemon.ask(question) for question in QA] == list(QA.values())
    shutil.rmtree(folder)
    assert [daemon.ask(question) for question in QA] == list(QA.values())


@pytest.mark.parametrize("release", ["1.1.4", "1.2.0", "1.2.3"])
def test_embeddings_between_the_turns_of_a_chat(start_daemon: Callable[..., Any], tmp_path: Path, release: str) -> None:
    """A file that was loaded for the chat takes no row from them, and what it saves is told, also before 1.2.0."""
    folder = tmp_path / "prompts"
    daemon = start_daemon(f"release: '{release}'\n" + SETTINGS.format(folder=folder), port=False)

    def embedding() -> Any:
        status, _, body = daemon.request("POST", "/v1/embeddings", {"input": "What is an NPU?"})
        assert status == 200, body
        return body["data"][0]["embedding"]

    expected = embedding()
    messages: list[dict[str, str]] = []
    reused = []
    for question, answer in list(QA.items())[:3]:
        messages.append({"role": "user", "content": question})
        _, _, body = daemon.request("POST", "/v1/chat/completions", {"messages": messages, "temperature": 0})
        assert len(messages) > 1 or body["choices"][0]["message"]["content"] == answer
        messages.append({"role": "assistant", "content": body["choices"][0]["message"]["content"]})
        reused.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert embedding() == expected
    assert list(folder.glob("*.kv"))
    assert reused[0] <= 1
    assert 4 < reused[1] < reused[2] < body["usage"]["prompt_tokens"]
    assert daemon.metric("rkedge_prefill_saved_tokens_total") == sum(reused)


class _Engine(FakeEngine):
    """Answers with 10, 11, 12, ... behind a prompt of 3 tokens, up to 15; fails behind so many if it has a file."""

    info: Any = SimpleNamespace(release="1.2.3", max_context=64)

    def __init__(self, fails_behind: int, always: bool = False) -> None:
        super().__init__([])
        self.fails_behind, self.always = fails_behind, always
        self.runs: list[Request] = []

    async def agenerate(self, request: Request) -> AsyncGenerator[Any, None]:
        self.runs.append(request)
        said = len(request.tokens) - 3
        limit = request.max_new_tokens if request.max_new_tokens > 0 else 100
        for number in range(min(6 - said, limit)):
            if number == self.fails_behind and (request.save_prompt_cache or self.always):
                raise RunError("rkllm_run returned -1.")
            yield Token(10 + said + number)
        if request.save_prompt_cache or self.always:
            raise RunError("rkllm_run returned -1.")
        reason = FinishReason.STOP if 6 - said < limit else FinishReason.LENGTH
        yield Finished(reason, len(request.tokens), min(6 - said, limit))


def _run(engine: _Engine, request: Request) -> Sequence[Any]:
    model: Any = SimpleNamespace(engine=engine)

    events: list[Any] = []
    asyncio.run(PromptCaches(Path("/nowhere"), 50, 4).deliver(model, request, partial(_noted, events)))
    return events


def _noted(events: list[Any], more: list[Any]) -> bool:
    events += more
    return True


@pytest.mark.parametrize("fails_behind", range(8))
@pytest.mark.parametrize("limit", [-1, 4, 6, 7])
def test_a_run_that_fails_for_its_file_goes_on_where_it_was(fails_behind: int, limit: int, tmp_path: Path) -> None:
    request = Request([1, 2, 3], max_new_tokens=limit, save_prompt_cache=tmp_path / "a.kv")
    plain = _run(_Engine(fails_behind), Request([1, 2, 3], max_new_tokens=limit))
    assert _run(_Engine(fails_behind), request) == plain


def test_a_run_that_fails_for_something_else_fails(tmp_path: Path) -> None:
    engine = _Engine(2, always=True)
    with pytest.raises(RunError):
        _run(engine, Request([1, 2, 3], save_prompt_cache=tmp_path / "a.kv"))
    assert len(engine.runs) == 2
    engine = _Engine(2, always=True)
    with pytest.raises(RunError):
        _run(engine, Request([1, 2, 3]))
    assert len(engine.runs) == 1


class _CrashesWithFiles(_Engine):
    """Is lost in each call with a file: as it is saved, or as it is loaded."""

    def __init__(self, in_load: bool) -> None:
        super().__init__(99)
        self.in_load = in_load
        self.loads = 0

    def load_prompt_cache(self, path: Path) -> None:
        self.loads += 1
        if self.in_load:
            raise WorkerCrashedError("gone")

    def release_prompt_cache(self) -> None: ...

    async def agenerate(self, request: Request) -> AsyncGenerator[Any, None]:
        self.runs.append(request)
        yield Token(10)
        if request.save_prompt_cache and not self.in_load:
            raise WorkerCrashedError("gone")
        yield Finished(FinishReason.STOP, len(request.tokens), 1)


@pytest.mark.parametrize("in_load", [False, True], ids=["save", "load"])
def test_files_that_crash_the_runtime_are_tried_once_for_a_model(
    in_load: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = _CrashesWithFiles(in_load)
    files = {"model.rkllm": SimpleNamespace(sha256="one")}
    model: Any = SimpleNamespace(engine=engine)
    model.bundle = SimpleNamespace(manifest=SimpleNamespace(files=files, model_file="model.rkllm"))
    caches = PromptCaches(tmp_path, 50, 4)
    tokens = list(range(20))
    if in_load:
        caches._keep(model, tmp_path / "a.kv", tokens)

    async def ask() -> bool:
        """Whether the answer came."""
        request = await caches.prepare(model, Request([*tokens, 99]))
        events: list[Any] = []
        try:
            await caches.deliver(model, request, partial(_noted, events))
            return isinstance(events[-1], Finished)
        except WorkerCrashedError:
            return False

    assert [asyncio.run(ask()) for _ in range(4)] == [in_load, True, True, True]
    assert engine.loads == in_load
    assert sum(run.save_prompt_cache is not None for run in engine.runs) <= 1
    assert caplog.text.count("no more of them for this model") == 1
    files["model.rkllm"] = SimpleNamespace(sha256="another")
    asyncio.run(ask())
    assert caplog.text.count("no more of them for this model") == 1 + (not in_load)
