"""Settings: the example file is the truth, wrong ones are refused, and nothing opens to a network without a key."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hypothesis
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from rkruntime.errors import UsageError
from rkruntime.resources import resource
from rkruntime.serve import settings
from rkruntime.serve.settings import Listen, Settings, check_listen, default_socket, load_settings, read_keys

KEY = "0123456789abcdef0123456789abcdef"


def test_the_example_file_shows_every_key_with_its_default() -> None:
    path = resource("configs") / "daemon.yaml"
    loaded = load_settings(path)
    assert loaded == replace(Settings(), bundle=Path("/var/lib/rkedge/bundle"))

    def missing(kind: Any, data: dict[str, Any]) -> set[str]:
        names = {item.name for item in fields(kind)} - data.keys()
        inner = {item.name: getattr(Settings(), item.name) for item in fields(kind) if kind is Settings}
        return names.union(*(missing(type(value), data[name]) for name, value in inner.items() if is_dataclass(value)))

    assert not missing(Settings, yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit: {}", "unknown key limit"),
        ("limits: {queue: many}", r"limits\.queue is str"),
        ("per_request_sampling: maybe", "must be one of ignore, refuse"),
        ("[]", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("{" * 5000, "nested over 32 deep"),
        ("!!python/object/apply:os.system ['true']", "tags are not accepted"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "daemon.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_settings(path)


@pytest.mark.parametrize(
    "key",
    [
        "bundle", "library", "release", "listen.socket", "listen.host", "listen.api_keys", "sessions.folder",
        "prompt_cache.folder",
    ],
)  # fmt: skip
def test_an_empty_value_is_not_the_current_folder(tmp_path: Path, key: str) -> None:
    path = tmp_path / "daemon.yaml"
    room, _, name = key.rpartition(".")
    path.write_text(f"{room}: {{{name}: ''}}" if room else f"{name}: ''")
    with pytest.raises(UsageError, match=key.replace(".", r"\.") + " is empty"):
        load_settings(path)


def numbers(kind: Any, where: str = "") -> Iterator[tuple[str, bool]]:
    """The key of every number in the settings, and whether it must be whole."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from numbers(hint, f"{where}{name}.")
        for part in get_args(hint) or (hint,):
            if part in (int, float):
                yield f"{where}{name}", part is int


@pytest.mark.parametrize(("key", "whole"), [*numbers(Settings)])
def test_every_number_has_a_range(tmp_path: Path, key: str, whole: bool) -> None:
    """What nobody can mean is refused where it stands, and not met later as an overflow or a wait of years."""
    path = tmp_path / "daemon.yaml"
    for value in (-1, 1 << 62, *([] if whole else [-0.5, 1.0e300])):
        content: Any = value
        for name in reversed(key.split(".")):
            content = {name: content}
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(UsageError, match=key.replace(".", r"\.")):
            check_listen(load_settings(path).listen)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["queue", "port", "max_mb", "socket", "x"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(st.sampled_from(sorted(Settings.__dataclass_fields__)), JUNK) | JUNK)
def test_whatever_stands_in_the_settings_is_settings_or_a_usage_error(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "daemon.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), errors="surrogatepass")
    with suppress(UsageError):
        check_listen(load_settings(path).listen)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# mine\n{KEY}\n\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "board.local", "", "128.0.0.1", "127.0.0.1.example.org"]
)
def test_a_wide_address_needs_keys(host: str, keys: Path) -> None:
    with pytest.raises(UsageError, match="no API keys"):
        check_listen(Listen(host=host, port=8080))
    assert list(check_listen(Listen(host=host, port=8080, api_keys=keys))) == [KEY]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert check_listen(Listen(host=host, port=8080)) == {}


def test_without_a_port_no_address_matters() -> None:
    assert check_listen(Listen(host="0.0.0.0")) == {}


@pytest.mark.parametrize(
    "listen", [Listen(port=70000), Listen(port=-1), Listen(socket_mode="rw"), Listen(socket_mode="7777")]
)
def test_nonsense_is_refused(listen: Listen) -> None:
    with pytest.raises(UsageError):
        check_listen(listen)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b"#" * (2 << 20))])
def test_a_key_file_that_has_no_end(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "odd")
    (tmp_path / "odd").chmod(0o600)
    with pytest.raises(UsageError, match=r"cannot be read: (it is not a regular file|it has more than|Is a directory)"):
        read_keys(tmp_path / "odd")


def test_keys_are_kept_from_others(keys: Path) -> None:
    keys.chmod(0o640)
    with pytest.raises(UsageError, match="Others can read"):
        read_keys(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# only a comment\n", "has no key"),
        ("short\n", "line 1: the key has fewer than 16"),
        (f"{KEY}\nann short\n", "line 2: the key has fewer than 16"),
        (f"ann {KEY}\nbob {KEY}\n", "line 2: the key has two users"),
        (f"{KEY}\nbob {KEY}\n", "line 2: the key has two users"),
        (f"ann bob {KEY}\n", "expected NAME KEY"),
        *(
            (f"{name} {KEY}\n", "expected NAME KEY")
            for name in ("../bob", "network", "local", "uid-0", "key-1", "é", "a+b")
        ),
    ],
)
def test_keys_that_keep_nobody_out(keys: Path, text: str, message: str) -> None:
    keys.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_keys(keys)


def test_a_key_says_whose_it_is(keys: Path) -> None:
    more = [f"{number:032}" for number in range(3)]
    keys.write_text(f"ann {KEY}\n  bob\t{more[0]}  \n#carol {more[1]}\n{more[1]}\n{more[2]}\nann {'x' * 16}\n")
    users = read_keys(keys)
    assert [users[key] for key in (KEY, more[0], "x" * 16)] == ["ann", "bob", "ann"]
    unnamed = {users[key] for key in more[1:]}
    assert len(unnamed) == 2
    assert all(user.startswith("key-") and not any(key in user for key in more) for user in unnamed)


def test_the_socket_is_the_services_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RKEDGE_SOCKET", raising=False)
    monkeypatch.setattr(settings, "SYSTEM_SOCKET", tmp_path / "run" / "rkedge.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    assert default_socket() == tmp_path / "user" / "rkedge" / "rkedge.sock"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rkedge.sock").touch()
    assert default_socket() == tmp_path / "run" / "rkedge.sock"
    monkeypatch.setenv("RKEDGE_SOCKET", "/mine")
    assert default_socket() == Path("/mine")


@pytest.mark.parametrize("runtime", ["", "user"])
def test_a_variable_that_names_no_folder_is_not_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    monkeypatch.setattr(settings, "SYSTEM_SOCKET", tmp_path / "run" / "rkedge.sock")
    monkeypatch.setenv("RKEDGE_SOCKET", "")
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert default_socket() == tmp_path / "run" / "rkedge.sock"


def test_systemd_names_the_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert settings.state_folder("state") == tmp_path / "rkedge"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/rkedge:/other")
    assert settings.state_folder("state") == Path("/var/lib/rkedge")
