"""What an inventory may say, and what it is told if it says something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rkboard.fleet.inventory import chosen, read_inventory
from rkruntime.errors import UsageError

GOOD = """\
bundle: gemma
library: libs/librkllmrt.so
groups:
  office:
    boards:
      desk: {ssh: root@10.0.0.11, url: "http://10.0.0.11:8080", key: KEY_DESK}
      hall:
        ssh: ann@hall
        bundle: /models/other
        test: false
  lab:
    bundle: lab-model
    test: false
    boards:
      one: {ssh: one, url: "http://[::1]:81/", test: true}
"""


def put(folder: Path, text: str | bytes) -> Path:
    path = folder / "boards.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_nearest_level_counts(tmp_path: Path) -> None:
    desk, hall, one = read_inventory(put(tmp_path, GOOD))
    assert (desk.name, desk.group, desk.destination) == ("desk", "office", "root@10.0.0.11")
    assert (desk.bundle, hall.bundle, one.bundle) == (tmp_path / "gemma", Path("/models/other"), tmp_path / "lab-model")
    assert {entry.library for entry in (desk, hall, one)} == {tmp_path / "libs/librkllmrt.so"}
    assert [entry.test for entry in (desk, hall, one)] == [True, False, True]
    assert (desk.address, desk.key, hall.host, one.address) == ("10.0.0.11:8080", "KEY_DESK", "", "[::1]:81")


def test_users_are_others_in_another_case(tmp_path: Path) -> None:
    text = "groups: {a: {boards: {b: {ssh: root@a}, c: {ssh: ROOT@a}, d: {ssh: a}}}}"
    assert [entry.destination for entry in read_inventory(put(tmp_path, text))] == ["root@a", "ROOT@a", "a"]


def test_which_boards(tmp_path: Path) -> None:
    found = read_inventory(put(tmp_path, GOOD))
    names = [
        [entry.name for entry in chosen(found, groups, boards)]
        for groups, boards in (([], []), (["lab"], []), ([], ["hall"]), (["lab"], ["desk"]))
    ]
    assert names == [["desk", "hall", "one"], ["one"], ["hall"], ["desk", "one"]]
    with pytest.raises(UsageError) as caught:
        chosen(found, ["ofice"], [])
    assert "office" in caught.value.hint


WRONG = {
    "groups: {a: {boards: {b: {ssh: x, bundel: y}}}}": "did you mean bundle?",
    "groups: {a: {board: {b: {ssh: x}}}}": "did you mean boards?",
    "grups: {}": "did you mean groups?",
    "groups: {a: {boards: {b: {ssh: x, test: 1}}}}": "true or false",
    "groups: {a: {boards: {b: x}}}": "a mapping",
    "groups: [a]": "a mapping",
    "groups: {a: {boards: {b: {}}}}": "not a destination of ssh",
    "groups: {a: {boards: {b: {ssh: -oProxyCommand=x}}}}": "not a destination of ssh",
    'groups: {a: {boards: {b: {ssh: "x\\ny"}}}}': "not a destination of ssh",
    'groups: {a: {boards: {b: {ssh: "\\e[31mx"}}}}': "not a destination of ssh",
    'groups: {a: {boards: {"b/../c": {ssh: x}}}}': "not a name for a board",
    'groups: {"a\\n": {boards: {b: {ssh: x}}}}': "not a name for a group",
    "groups: {a: {boards: {b: {ssh: x}, c: {ssh: x}}}}": "two boards have the ssh x",
    "groups: {a: {boards: {b: {ssh: root@a}, c: {ssh: root@A}}}}": "the ssh root@A, once as root@a",
    "groups: {a: {boards: {b: {ssh: Desk.LAN}, c: {ssh: desk.lan}}}}": "the ssh desk.lan, once as Desk.LAN",
    "groups: {a: {boards: {b: {ssh: 'ssh://root@A:22'}, c: {ssh: 'ssh://root@a:22'}}}}": "two boards have the ssh",
    "groups: {a: {boards: {b: {ssh: x, url: 'http://H:1'}, c: {ssh: y, url: 'http://h:1'}}}}": "h:1, once as H:1",
    "groups: {a: {boards: {b: {ssh: x}}}, c: {boards: {b: {ssh: y}}}}": "two boards have the name b",
    "groups: {}": "names no board",
    "": "names no board",
    "- a": "must be a mapping",
    "groups: {a: {boards: {b: {ssh: x}, b: {ssh: y}}}}": "occurs twice",
    "groups: &a {b: *a}": "aliases",
    "groups: !!python/object:os.system {}": "tags",
    "\0": "YAML",
    "groups: {a: {boards: {b: {ssh: " + "x" * 300 + "}}}}": "may have 256",
    "groups: {a: {boards: {" + ", ".join(f"b{n}: {{ssh: x{n}}}" for n in range(300)) + "}}}": "it may name 256",
    "groups: {a: {boards: {b: {ssh: x, key: $(id)}}}}": "environment variable",
    "groups: {a: {boards: {b: {ssh: x, url: 'http://h:1'}, c: {ssh: y, url: 'http://h:1'}}}}": "have the url h:1",
}
URLS = [
    "10.0.0.1:8080", "https://h:1", "http://h", "http://h:0", "http://h:99999", "http://u@h:1", "http://u:p@h:1",
    "http://h:1/v1", "http://h:1?x", "http://h:1#x", "http://h;}:1", "http://h:1;}", "http://h:1\n}", "http://h $x:1",
    "http://$host:1", "http://[::1:1", "unix:/x", "http://h:-1", "http://:1", "http://h%:1", "http://\u212a:1", "",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=WRONG[text].replace("?", r"\?")):
        read_inventory(put(tmp_path, text))


@pytest.mark.parametrize("url", URLS)
def test_an_address_is_nothing_else(url: str, tmp_path: Path) -> None:
    """It goes into the configuration of nginx."""
    text = yaml.safe_dump({"groups": {"a": {"boards": {"b": {"ssh": "x", "url": url}}}}})
    with pytest.raises(UsageError, match="url"):
        read_inventory(put(tmp_path, text))


@pytest.mark.parametrize("key", ["bundle", "library"])
@pytest.mark.parametrize("level", [(), ("groups", "a"), ("groups", "a", "boards", "b")])
def test_an_empty_path_does_not_take_back_what_another_level_says(
    key: str, level: tuple[str, ...], tmp_path: Path
) -> None:
    text: dict[str, Any] = {"bundle": "x", "library": "y", "groups": {"a": {"boards": {"b": {"ssh": "x"}}}}}
    place = text
    for name in level:
        place = place[name]
    place[key] = ""
    with pytest.raises(UsageError, match=f"{key} is empty"):
        read_inventory(put(tmp_path, yaml.safe_dump(text)))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(UsageError, match="cannot be read"):
            read_inventory(path)
    with pytest.raises(UsageError):
        read_inventory(put(tmp_path, b"\xff\xfe"))
    with pytest.raises(UsageError):
        read_inventory(put(tmp_path, "a: " + "[" * 10**5))
    with pytest.raises(UsageError):
        read_inventory(put(tmp_path, "a" * (2 << 20)))


KEYS = st.sampled_from(["groups", "boards", "ssh", "url", "key", "bundle", "library", "test", "office", "desk"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("http://h:1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(st.binary(max_size=200) | ANYTHING.map(lambda data: yaml.safe_dump(data).encode()))
def test_anything_is_boards_or_a_message(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "boards.yaml"
    path.write_bytes(text)
    try:
        assert read_inventory(path)
    except UsageError as error:
        assert len(error.message) < 1000
