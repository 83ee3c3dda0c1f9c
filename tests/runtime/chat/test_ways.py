"""What `rkedge chat WORD` is a chat with: a bundle, a host, or the daemon on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rkruntime import cli
from rkruntime.bundle.manifest import MANIFEST, Bundle
from rkruntime.chat.ways import is_destination, on_this_machine, over_ssh
from rkruntime.errors import BundleError, ServiceError, UsageError

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no OpenSSH here")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's ~/.ssh/config, with hosts where nothing listens; and no bundles but those in the current folder."""
    (tmp_path / "more").write_text("Host included\n  User pi\n")
    path = tmp_path / "config"
    path.write_text(
        f"Include {tmp_path}/more\n"
        "Host board rock-*\n  HostName 127.0.0.1\n  Port 1\n"
        "Host demo\n  HostName 127.0.0.1\n  Port 1\n"
        "Host *\n  ConnectTimeout 1\n  ControlMaster no\n  ControlPath /tmp/none-%r@%h:%p\n"
    )
    monkeypatch.setenv("RKEDGE_SSH", f"ssh -F {path}")
    for kind in ("CACHE", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return path


@needs_ssh
@pytest.mark.usefixtures("config")
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("board", True),
        ("rock-5b", True),
        ("included", True),
        ("me@anything", True),
        ("ssh://anything", True),
        ("anything", False),
        ("none", False),  # values of settings
        ("yes", False),
        ("orangepi.local", False),
        ("a", False),
        ("-oProxyCommand=x", False),
        ("two words", False),
        ("", False),
        ("x" * 5000, False),
        ("caf\udce9", False),
    ],
)
def test_hosts_are_those_that_the_configuration_names(word: str, expected: bool) -> None:
    assert is_destination(word) is expected


@pytest.mark.parametrize("ssh", ["/nowhere/ssh", "false", "sh -c 'sleep 60'"])
def test_an_ssh_that_cannot_be_asked_names_no_host(ssh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkruntime.chat.ways._PATIENCE_S", 0.5)
    monkeypatch.setenv("RKEDGE_SSH", ssh)
    assert not is_destination("board")


@needs_ssh
@pytest.mark.usefixtures("config")
def test_a_host_of_the_configuration_is_connected_to(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "board"]) == ServiceError.exit_code
    assert "ssh could not connect or log in to board" in capfd.readouterr().err


@needs_ssh
@pytest.mark.usefixtures("config")
def test_a_bundle_wins_over_a_host_and_a_folder_does_not(
    fake_bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("demo").mkdir()
    assert cli.main(["chat", "demo"]) == ServiceError.exit_code
    shutil.copytree(fake_bundle.path, "demo", dirs_exist_ok=True)
    (Path("demo") / MANIFEST).write_text("schema: other\n")
    capfd.readouterr()
    assert cli.main(["chat", "demo"]) == BundleError.exit_code
    assert "has the schema 'other'" in capfd.readouterr().err


@pytest.mark.usefixtures("config")
def test_neither_a_bundle_nor_a_host(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "anything"]) == BundleError.exit_code
    error = capfd.readouterr().err
    assert "There is no bundle or host anything" in error
    assert "user@board" in error
    Path("folder").mkdir()
    assert cli.main(["chat", "folder"]) == BundleError.exit_code
    assert "folder is a folder here but not a bundle" in capfd.readouterr().err


@pytest.mark.usefixtures("config")
def test_the_daemon_here_is_the_one_that_the_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RKEDGE_SOCKET", str(tmp_path / "socket"))
    assert cli.main(["chat"]) == ServiceError.exit_code
    error = capfd.readouterr().err
    assert f"No daemon answers on {tmp_path}/socket: No such file or directory." in error
    assert "rkedge up BUNDLE" in error


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize(
    ("members", "owner", "said", "step"),
    [
        (None, 12345, "is another account's", "rkedge up BUNDLE"),
        (["pi"], 54321, "is another account's", "rkedge up BUNDLE"),
        ([], 12345, "The account pi may not use the daemon", "On the board: sudo usermod -aG rkedge pi, then log in"),
        (["pi"], 12345, "This login is older than the membership of pi in the group rkedge", "in again"),
        (["pi"], None, "This login is older than the membership of pi in the group rkedge", "in again"),
    ],
    ids=["no group", "another's", "no member", "an old login", "a closed folder"],
)
def test_a_socket_that_one_may_not_open(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    members: list[str] | None,
    owner: int | None,
    said: str,
    step: str,
) -> None:
    """serve/test_install.py has a real one."""

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    groups = [] if members is None else [SimpleNamespace(gr_name="rkedge", gr_mem=members, gr_gid=12345)]
    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("grp.getgrall", lambda: groups)
    monkeypatch.setattr("rkruntime.chat.attach._groups_of", lambda *_: iter([] if owner is None else [owner]))
    monkeypatch.setattr("pwd.getpwuid", lambda _: SimpleNamespace(pw_name="pi"))
    assert cli.main(["chat"]) == ServiceError.exit_code
    error = capfd.readouterr().err
    assert said in error
    assert step in error
    assert "systemctl" not in error


def test_options_that_belong_to_the_other_kind_are_refused(
    fake_bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in ([fake_bundle.path, "--session", "x"], [fake_bundle.path, "--sessions"], ["me@board", "--force"]):
        assert cli.main(["chat", *map(str, words)]) == UsageError.exit_code
        assert "daemon" in capfd.readouterr().err


def test_a_module_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that PYTHONPATH or the folder itself would put first."""
    import subprocess

    (tmp_path / "rkruntime").mkdir()
    (tmp_path / "rkruntime" / "__init__.py").write_text("raise SystemExit('stranger')")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        on_this_machine(tmp_path / "socket", "").command, input=b"", capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_word_is_never_an_option_of_ssh() -> None:
    with pytest.raises(UsageError, match="not a board"):
        over_ssh("-oProxyCommand=x@y")
    assert over_ssh("x@y").command[-4:-1] == ["--", "x@y", "rkedge"]
