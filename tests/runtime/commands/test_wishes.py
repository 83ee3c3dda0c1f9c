"""What is asked for on the command line or in a file of settings is what the daemon gets, zeros and flags included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from rkruntime import background, cli
from rkruntime.bundle.manifest import Bundle
from rkruntime.commands import serve, up
from rkruntime.engine.open import RuntimeOptions, SamplingOptions
from rkruntime.errors import ServiceError
from rkruntime.serve import server
from rkruntime.serve.settings import Settings, flat, load_settings

OPTIONS = {item.name for kind in (RuntimeOptions, SamplingOptions) for item in fields(kind)}


def values(option: click.Parameter) -> list[Any]:
    """What an option may be: the ends of its range, a text, a flag."""
    if isinstance(option.type, (click.IntRange, click.FloatRange)):
        return [option.type.min, option.type.max]
    if getattr(option, "is_flag", False):
        return [True]
    return ["/somewhere/librkllmrt.so"] if option.name == "library" else ["1.2.3"]


def cases(command: click.Command) -> list[tuple[str, Any]]:
    return [
        (str(option.name), value)
        for option in command.params
        if option.name in OPTIONS
        for value in values(option)
    ]  # fmt: skip


def words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    return [option] if value is True else [option, str(value)]


def found(settings: Settings, name: str) -> Any:
    value = dict(flat(settings))["limits.max_new_tokens" if name == "max_new_tokens" else name]
    return str(value) if isinstance(value, Path) else value


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Settings]:
    """The settings that a daemon begins with, and reads again, by the words of `rkedge serve`."""

    def run(*given: str | Path) -> Settings:
        seen: list[Settings] = []

        class Daemon:
            def __init__(self, first: Settings, reread: Callable[[], Settings]) -> None:
                seen.extend((first, reread()))

            async def run(self) -> None:
                pass

        monkeypatch.setattr(server, "Daemon", Daemon)
        assert cli.main(["serve", *map(str, given)]) == 0
        assert seen[0] == seen[1]
        return seen[0]

    return run


@pytest.mark.parametrize(("name", "value"), cases(up.run))
def test_up_hands_each_option_on(
    name: str, value: Any, fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(background, "_SHELL", ("/bin/false",))
    assert cli.main(["up", str(fake_bundle.path), "--no-chat", *words(name, value)]) == ServiceError.exit_code
    assert found(load_settings(tmp_path / "rkedge/up/daemon.yaml"), name) == value


@pytest.mark.parametrize(("name", "value"), cases(serve.run))
def test_serve_takes_each_option_and_each_setting(
    name: str, value: Any, fake_bundle: Bundle, started: Callable[..., Settings], tmp_path: Path
) -> None:
    """An option counts more than the file, and the file more than an option that was not given."""
    config, other = tmp_path / "daemon.yaml", {"max_context": 4096, "base_domain_id": 7}.get(name)
    config.write_text(yaml.safe_dump({"bundle": str(fake_bundle.path), name: value}))
    assert found(started("--config", config), name) == value
    config.write_text(yaml.safe_dump({"bundle": str(fake_bundle.path), name: other} if other else {}))
    assert found(started(fake_bundle.path, "--config", config, *words(name, value)), name) == value


def test_a_file_of_settings_is_all_there_is(
    fake_bundle: Bundle, started: Callable[..., Settings], tmp_path: Path
) -> None:
    config = tmp_path / "daemon.yaml"
    content = {
        "bundle": str(fake_bundle.path), "force": True, "temperature": 0, "top_p": 0, "base_domain_id": 0,
        "load_at_start": False, "strict_roles": True, "listen": {"port": 0, "host": "localhost"},
        "limits": {"queue": 0, "stop_s": 0}, "sessions": {"max_mb": 0}, "prompt_cache": {"max_mb": 0},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(content))
    assert started("--config", config) == load_settings(config)
