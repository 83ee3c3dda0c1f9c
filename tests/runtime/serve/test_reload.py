"""Settings read again: each is taken or said not to be, keys whatever else happens, and no bundle locks anybody out."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from rkconvert.demo import questions
from rkruntime.resources import resource
from rkruntime.serve.host import Host
from rkruntime.serve.server import Daemon
from rkruntime.serve.settings import Listen, PromptCache, Sessions, Settings, load_settings
from rkruntime.testing import fake_model

FIRST = "What is the RK3588?"
BASE, PIRATE = next((row.answer, row.pirate) for row in questions() if row.question == FIRST)
# What is read when it is needed, and where it is read.
IN_FORCE: dict[str, Callable[[Daemon], Any]] = {
    "per_request_sampling": lambda daemon: daemon.service.settings.per_request_sampling,
    "strict_roles": lambda daemon: daemon.service.settings.strict_roles,
    "tools": lambda daemon: daemon.service.settings.tools,
    "idle_unload_s": lambda daemon: daemon.service.settings.idle_unload_s,
    "hold_clocks_s": lambda daemon: daemon.service.settings.hold_clocks_s,
    "log_prompts": lambda daemon: daemon.service.settings.log_prompts,
    "log_level": lambda _: logging.getLevelName(logging.getLogger("rkedge").level).lower(),
    "listen.api_keys": lambda daemon: [*daemon._doors[1].keys.values()],
    "limits.queue": lambda daemon: daemon.service.queue.length,
    "limits.wait_s": lambda daemon: daemon.service.queue.wait_s,
    "limits.request_s": lambda daemon: daemon.service.settings.limits.request_s,
    "limits.max_new_tokens": lambda daemon: daemon.service.settings.limits.max_new_tokens,
    "sessions.max_mb": lambda daemon: daemon.service.sessions._max_bytes / 1e6,
    "sessions.max_number": lambda daemon: daemon.service.sessions._max_number,
    "sessions.resume_s": lambda daemon: daemon.service.settings.sessions.resume_s,
}
# What has an effect on a model that is loaded.
OF_THE_MODEL = {"bundle", "library", "release", "max_context", "force", "base_domain_id"} | {
    "temperature",
    "top_k",
    "top_p",
    "repeat_penalty",
}


def names(kind: Any = Settings, where: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from names(hint, f"{name}.")
        else:
            yield f"{where}{name}", hint


def other(name: str, hint: Any, value: Any, folder: Path) -> Any:
    """Another value than the one there is."""
    if name == "listen.api_keys":
        path = folder / "keys"
        path.write_text(f"ann {'a' * 32}")
        path.chmod(0o600)
        return path
    special: dict[str, Any] = {
        "listen.origins": ("http://other",),
        "listen.host": "127.0.0.2",
        "listen.socket_mode": "0600",
        "release": "1.2.0",
        "top_p": 0.5,
    }
    if name in special:
        return special[name]
    choices = [item for item in get_args(hint) if isinstance(item, str) and item != value]
    kinds = {item for item in (hint, *get_args(hint)) if isinstance(item, type)}
    if choices:
        return choices[0]
    if bool in kinds:
        return not value
    return folder / "other" if Path in kinds else (value or 100) + 1


def with_value(settings: Settings, name: str, value: Any) -> Settings:
    part, _, rest = name.rpartition(".")
    return replace(settings, **{part: replace(getattr(settings, part), **{rest: value})} if part else {name: value})


def value_of(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.fixture
def short() -> Iterator[Path]:
    """A Unix socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(("name", "hint"), [*names()], ids=[name for name, _ in names()])
def test_each_setting_is_taken_or_named(short: Path, caplog: pytest.LogCaptureFixture, name: str, hint: Any) -> None:
    """A setting that is added is in none of the tables above: then a reload must name it."""
    # The daemon sets it anew; caplog puts it back.
    caplog.set_level(logging.INFO, "rkedge")
    settings = Settings(
        listen=Listen(short / "s", port=0),
        sessions=Sessions(short / "sessions"),
        prompt_cache=PromptCache(short / "prompts"),
    )
    value = other(name, hint, value_of(settings, name), short)
    wanted = with_value(settings, name, value)
    loads: list[Settings] = []

    def load(given: Settings, _: Any) -> Any:
        loads.append(given)
        return fake_model()

    async def main() -> None:
        daemon = Daemon(settings, lambda: wanted, Host(settings, load, lambda *_: None))
        try:
            await daemon.service.host.model()
            # The warning comes again as long as it is true.
            for _ in range(1 if name in OF_THE_MODEL else 2):
                caplog.clear()
                await daemon.reload()
                warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
                named = any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", line) for line in warned)
                assert named is (name not in IN_FORCE and name not in OF_THE_MODEL), warned
            if name in IN_FORCE:
                assert IN_FORCE[name](daemon) == (["ann"] if name == "listen.api_keys" else value)
            assert loads == [settings, *([wanted] if name in OF_THE_MODEL else [])]
            assert daemon.service.host.settings == wanted
        finally:
            await daemon.service.host.unload()
            for door in daemon._doors:
                door.listener.close()
            daemon._locks.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", [name for name, _ in names()])
def test_the_example_file_marks_what_a_reload_does_not_take(name: str) -> None:
    section, _, key = name.rpartition(".")
    text = (resource("configs") / "daemon.yaml").read_text()
    part = re.search(rf"^{section}:.*\n((?:(?: .*)?\n)+)", text, re.MULTILINE)[1] if section else text  # type: ignore[index]
    line = re.search(rf"^{'  ' if section else ''}{key}:.*", part, re.MULTILINE)
    assert line
    marks = re.findall(r"\((restart|next load)\)", line[0])
    late = {"limits.load_s": "next load", "limits.token_s": "next load"}
    assert marks == ([] if name in IN_FORCE or name in OF_THE_MODEL else [late.get(name, "restart")])


def statuses(daemon: Any) -> list[int]:
    found = []
    for key in "ab":
        one = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)
        one.request("GET", "/sessions", headers={"Authorization": f"Bearer {key * 32}"})
        found.append(one.getresponse().status)
        one.close()
    return found


@pytest.mark.parametrize("trouble", ["busy", "bundle"])
def test_a_revoked_key_is_refused_whatever_the_npu_does(
    start_daemon: Callable[..., Any], bundles: dict[str, Path], tmp_path: Path, trouble: str
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann {'a' * 32}\n")
    keys.chmod(0o600)
    settings = f"listen: {{api_keys: {keys}}}\nlimits: {{wait_s: 0.2}}\n"
    daemon = start_daemon(settings, RKEMU_TOKEN_US="100000")
    assert statuses(daemon) == [200, 401]
    keys.write_text(f"bob {'b' * 32}\n")
    if trouble == "busy":
        asking = threading.Thread(target=daemon.ask, args=(FIRST,))
        asking.start()
        daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["queue"]["busy"])
    else:
        (daemon.state / "daemon.yaml").write_text(settings + "library: /no/such/library.so\n")
    daemon.process.send_signal(signal.SIGHUP)
    told = "keys and limits were applied" if trouble == "busy" else "the model was not changed"
    daemon.wait_until(lambda: told in daemon.log)
    assert statuses(daemon) == [401, 200]
    if trouble == "busy":
        asking.join()
        daemon.wait_until(lambda: "settings read again" in daemon.log)
    else:
        assert daemon.ask("Does it work?")


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "log_level: debug\n", "listen: {}\nlimits: {queue: 1}\n", "listen: {api_keys: null}\n", "{}"],
)
@pytest.mark.parametrize("named", ["bundle in the settings", "bundle in the command"])
def test_settings_without_keys_do_not_open_a_port_that_had_some(
    short: Path, caplog: pytest.LogCaptureFixture, text: str, named: str
) -> None:
    """An editor empties a file for a moment; what it says then is no decision of anybody's."""
    caplog.set_level(logging.INFO, "rkedge")
    (short / "keys").write_text(f"ann {'a' * 32}")
    (short / "keys").chmod(0o600)
    settings = Settings(
        bundle=short / "bundle",
        listen=Listen(short / "s", port=0, api_keys=short / "keys"),
        sessions=Sessions(short / "sessions"),
        prompt_cache=PromptCache(short / "prompts"),
    )

    def reread() -> Settings:
        (short / "daemon.yaml").write_text(text)
        found = load_settings(short / "daemon.yaml")
        bundle = settings.bundle if named == "bundle in the command" else found.bundle
        return replace(found, bundle=bundle, listen=replace(found.listen, socket=short / "s", port=0))

    async def main() -> None:
        daemon = Daemon(settings, reread, Host(settings, lambda *_: fake_model(), lambda *_: None))
        try:
            for _ in range(2):
                await daemon.reload()
                assert [*daemon._doors[1].keys.values()] == ["ann"]
                assert daemon.service.settings is settings
                assert "the settings were not applied" in caplog.text
                assert daemon.service.host.settings == settings
        finally:
            for door in daemon._doors:
                door.listener.close()
            daemon._locks.close()

    asyncio.run(main())


def copy_over(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            # As rsync does: the old file stays whole for who has it open.
            place = target / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, f"{place}.new")
            Path(f"{place}.new").replace(place)


def prompt_processes(daemon: Any) -> list[int]:
    tasks = Path(f"/proc/{daemon.process.pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in children if b"prompt_child" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize("how", ["reload", "prompt process"])
def test_a_bundle_that_is_replaced_in_its_folder(
    start_daemon: Callable[..., Any], bundles: dict[str, Path], tmp_path: Path, how: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundles["base"], copy)
    daemon = start_daemon(bundle=copy, port=False)
    assert daemon.ask(FIRST) == BASE
    copy_over(bundles["pirate"], copy)
    # Another tokenizer.json too, which the model that is loaded must not be given.
    manifest = (copy / "rkedge.yaml").read_text()
    tokenizer = (copy / "tokenizer.json").read_bytes() + b"\n"
    old = re.search(r"tokenizer\.json:\n\s+size: (\d+)\n\s+sha256: (\w+)", manifest)
    assert old
    new = old[0].replace(old[1], str(len(tokenizer))).replace(old[2], hashlib.sha256(tokenizer).hexdigest())
    (copy / "tokenizer.json").write_bytes(tokenizer)
    (copy / "rkedge.yaml").write_text(manifest.replace(old[0], new))
    if how == "reload":
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_until(lambda: "settings read again" in daemon.log)
    else:
        for process in prompt_processes(daemon):
            os.kill(process, signal.SIGKILL)
        body = {"messages": [{"role": "user", "content": FIRST}]}
        failed = [daemon.request("POST", "/v1/chat/completions", body)[0] for _ in range(2)]
        assert {status for status in failed if status != 200} <= {500, 502, 503}
        assert failed[-1] == 200 or daemon.request("GET", "/ready")[0] == 503
        daemon.wait_until(lambda: daemon.request("POST", "/v1/chat/completions", body)[0] == 200)
    assert daemon.ask(FIRST) == PIRATE
    assert daemon.request("GET", "/ready")[0] == 200


def spoilt(source: Path, target: Path, how: str) -> Path:
    """A copy of a bundle that cannot be used."""
    shutil.copytree(source, target)
    model, manifest = target / "model.rkemu", target / "rkedge.yaml"
    if how == "cut":
        os.truncate(model, 1000)
    elif how == "no manifest":
        manifest.unlink()
    else:
        # As its manifest says, and yet no model.
        old = hashlib.sha256(model.read_bytes()).hexdigest()
        model.write_bytes(b"\0" * model.stat().st_size)
        manifest.write_text(manifest.read_text().replace(old, hashlib.sha256(model.read_bytes()).hexdigest()))
    return target


@pytest.mark.parametrize("how", ["cut", "no manifest", "not a model"])
def test_a_link_to_a_bundle_that_does_not_load(
    start_daemon: Callable[..., Any], bundles: dict[str, Path], tmp_path: Path, how: str
) -> None:
    link = tmp_path / "link"

    def name(bundle: Path) -> None:
        (tmp_path / "new").symlink_to(bundle)
        (tmp_path / "new").replace(link)
        failed, done = daemon.log.count("the model was not changed"), daemon.log.count("settings read again")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_until(
            lambda: (
                daemon.log.count("the model was not changed") + daemon.log.count("settings read again") > failed + done
            )
        )

    link.symlink_to(bundles["base"])
    daemon = start_daemon(bundle=link, port=False)
    workers = daemon.workers()
    bad = spoilt(bundles["pirate"], tmp_path / "spoilt", how)
    for _ in range(2):
        name(bad)
        assert "settings read again" not in daemon.log
        assert daemon.request("GET", "/ready")[2] == {"status": "ready", "loaded": True}
        assert (daemon.workers() == workers) is (how != "not a model")
        assert daemon.ask(FIRST) == BASE
    # A worker that dies now is replaced by one with the same model.
    for worker in daemon.workers():
        os.kill(worker, signal.SIGKILL)
    body = {"messages": [{"role": "user", "content": FIRST}], "temperature": 0}
    daemon.wait_until(lambda: daemon.request("POST", "/v1/chat/completions", body)[0] == 200)
    assert daemon.ask(FIRST) == BASE
    workers = daemon.workers()
    name(bundles["base"])
    assert daemon.workers() == workers
    name(bundles["pirate"])
    assert daemon.ask(FIRST) == PIRATE
