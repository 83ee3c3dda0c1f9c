"""The model behind the daemon, with a load that takes its time."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import BundleError, HostError, RKEdgeError, ServiceError, UsageError, WorkerError
from rkruntime.serve import host as host_module
from rkruntime.serve.api.http import status_of
from rkruntime.serve.host import Host
from rkruntime.serve.settings import Settings, read_keys


def test_a_reload_while_a_model_is_loaded_for_a_client_that_has_gone(tmp_path: Path) -> None:
    go, loaded = threading.Event(), []

    def load(settings: Settings, stop: Any) -> Any:
        assert go.wait(10)
        loaded.append(settings.max_context)
        manifest = SimpleNamespace(name="fake")
        return SimpleNamespace(bundle=SimpleNamespace(path=tmp_path, manifest=manifest), close=lambda: None)

    async def reload() -> None:
        before = Settings(max_context=512)
        host = Host(before, load, lambda *_: None)
        first = asyncio.create_task(host.model())
        await asyncio.sleep(0.05)
        first.cancel()
        asyncio.get_running_loop().call_later(0.1, go.set)
        after = replace(before, max_context=1024)
        assert host.needs_load(after)
        await host.change(after)
        assert loaded == [512, 1024]
        assert host.loaded_with is after
        assert not host.needs_load(after)
        await host.close()

    asyncio.run(reload())


class Loads:
    """Takes the place of `load_model`: fails with `problem` if there is one, and waits for `go`."""

    def __init__(self) -> None:
        self.problem: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        self.engine = SimpleNamespace(lost=False, check=self.check)

    def __call__(self, *_: Any) -> Any:
        assert self.go.wait(10)
        if self.problem:
            raise self.problem
        manifest = SimpleNamespace(name="fake")
        return SimpleNamespace(bundle=SimpleNamespace(manifest=manifest), close=lambda: None, engine=self.engine)

    def check(self) -> None:
        self.engine.lost = False  # the next one is another
        raise WorkerError("it died")


@pytest.mark.parametrize("problem", [WorkerError("no memory"), RuntimeError("a defect")])
def test_a_model_that_could_not_be_loaded_is_tried_again(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    """Without a request, which a proxy that looks at /ready never sends; and no request has to wait for it."""
    load = Loads()

    async def fail(host: Host) -> None:
        with pytest.raises(RKEdgeError, match=str(problem)):
            await host.bring_back()
        assert host.state == "failed"

    async def main() -> None:
        load.problem = problem
        host = Host(Settings(), load)
        assert host.due
        await fail(host)
        assert not host.due
        await host.bring_back()
        load.problem = None
        await host.again()
        assert host.state == "ready"

        monkeypatch.setattr(host_module, "_RETRY_S", 0.0)
        host, load.problem = Host(Settings(), load), problem
        for _ in range(5):  # a client that asks again and again
            host._next_try = 0.0
            with pytest.raises(RKEdgeError, match=str(problem)):
                await host.model()
        host._next_try = 0.0
        for _ in range(5):
            assert host.due
            await fail(host)
        load.problem = None
        await asyncio.wait_for(host.model(), 1)
        assert not host.due

    asyncio.run(main())


@pytest.mark.parametrize(
    ("problem", "defect"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), False),
        (UsageError("The bundle's max_context is 512."), False),
        (BundleError("It is damaged."), False),
        (KeyError("x"), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whose_fault_a_failed_load_is(caplog: pytest.LogCaptureFixture, problem: Exception, defect: bool) -> None:
    """Never the client's, who has only asked a question; and a traceback is for defects alone."""
    load = Loads()
    load.problem = problem

    async def main() -> RKEdgeError:
        with pytest.raises(RKEdgeError) as caught:
            await Host(Settings(), load).model()
        return caught.value

    error = asyncio.run(main())
    assert status_of(error)[0] == 503
    assert ("defect of rkedge" in error.message) == defect
    assert any(record.exc_info for record in caplog.records) == defect


def test_a_folder_that_is_gone_fails_like_any_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle's relative path, from a folder that somebody has removed."""

    async def main() -> None:
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        host = Host(Settings(bundle="b"), Loads())
        here.rmdir()
        with pytest.raises(HostError, match="No such file or directory"):
            await host.model()
        assert host.state == "failed"
        monkeypatch.chdir(tmp_path)
        await host.again()
        assert host.state == "ready"

    asyncio.run(main())


def test_a_dead_worker_is_noticed_after_a_load_that_failed() -> None:
    load = Loads()

    async def main() -> None:
        load.problem = WorkerError("no memory")
        host = Host(Settings(), load)
        with pytest.raises(WorkerError):
            await host.bring_back()
        load.problem = None
        await host.model()
        load.engine.lost = True
        assert host.due
        await host.bring_back()
        assert (host.state, host.restarts) == ("ready", 1)

    asyncio.run(main())


def test_a_model_that_somebody_unloads_stays_away() -> None:
    """While it is loaded for a client that has gone, too."""
    load = Loads()

    async def main() -> None:
        load.go.clear()
        host = Host(Settings(), load)
        client = asyncio.create_task(host.model())
        await asyncio.sleep(0.05)
        client.cancel()
        asyncio.get_running_loop().call_later(0.1, load.go.set)
        await host.unload()
        assert (host.state, host.due) == ("unloaded", False)
        load.problem = WorkerError("no memory")
        with pytest.raises(WorkerError):
            await host.model()
        await host.unload()
        assert (host.state, host.due) == ("unloaded", False)
        assert not Host(Settings(load_at_start=False), load).due

    asyncio.run(main())


def test_a_stop_ends_a_build_of_the_emulator(
    fake_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that takes for ever, in a child of its own as compilers do."""
    slow = tmp_path / "g++"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in\n*--version*|*-fsyntax-only*) exec {shutil.which("g++")} "$@";;\nesac\n'
        f"sleep 300 & echo $! >>{tmp_path}/pids; wait\n"
    )
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pids = tmp_path / "pids"

    async def main() -> None:
        settings = Settings(bundle=fake_bundle.path)
        host = Host(settings)
        load = asyncio.create_task(host.model())
        while not (pids.is_file() and pids.read_text().endswith("\n")):
            assert not load.done(), load.exception()
            await asyncio.sleep(0.02)
        host.stop()
        with pytest.raises(ServiceError, match="is stopping"):
            await asyncio.wait_for(load, 30)
        await host.close()

    asyncio.run(main())
    for pid in pids.read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or ") Z " in state.read_text()
    assert not list((tmp_path / "cache").rglob(".build-*"))


def test_a_key_that_no_header_can_carry_is_refused(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("ann 0123456789abcdef\nbob schl\u00fcsselschl\u00fcssel12\n", encoding="utf-8")
    keys.chmod(0o600)
    with pytest.raises(UsageError, match=r"line 2: the key is not ASCII"):
        read_keys(keys)
