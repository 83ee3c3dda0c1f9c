"""The user's own folders, and what there is without any."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from rkruntime import cli
from rkruntime.chat.repl import COMMANDS, Repl
from rkruntime.defects import typed
from rkruntime.errors import HostError, UsageError
from rkruntime.folders import own_folder


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that this machine does not know, as in a container that runs as any number."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "RKEDGE_SOCKET"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("words", [["list"], ["run", "demo", "?"], ["up", "demo"], ["down"], ["chat"], ["rm", "demo"]])
@pytest.mark.usefixtures("nobody")
def test_who_has_no_home_folder_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == HostError.exit_code
    assert "Set HOME" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody")
def test_folders_that_are_named_need_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert own_folder("cache") == tmp_path / "rkedge"
    with pytest.raises(HostError, match="no home folder"):
        own_folder("state")


@pytest.mark.parametrize("command", ["/save", "/load"])
def test_a_chat_goes_on_after_the_home_folder_of_nobody(command: str) -> None:
    with pytest.raises(UsageError, match="of an unknown user"):
        COMMANDS[command].action(Repl.__new__(Repl), "~nobody-of-this-name/talk.json")


def test_the_home_folder_of_nobody_is_no_defect_anywhere() -> None:
    with pytest.raises(RuntimeError) as caught:
        Path("~nobody-of-this-name/x").expanduser()
    assert isinstance(typed(caught.value), UsageError)
