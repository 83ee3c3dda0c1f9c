"""Bundles by name: where they are found, what a name may leave out, and what `rkedge rm` takes away."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rkruntime
from rkruntime import cli, model
from rkruntime.bundle.manifest import MANIFEST, Bundle, open_bundle
from rkruntime.bundle.names import find_bundle, named_bundles
from rkruntime.bundle.removal import remove_bundle
from rkruntime.errors import BundleError, RKEdgeError, UsageError

Make = Callable[[Path], Path]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The three places: empty folders of this test's own."""
    for kind in ("cache", "data"):
        monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", str(tmp_path / kind))
    found = {
        "here": tmp_path / "here",
        "own": tmp_path / "data" / "rkedge" / "bundles",
        "demo": tmp_path / "cache" / "rkedge" / "demo-0123",
    }
    for folder in found.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(found["here"])
    return found


@pytest.fixture
def make(fake_bundle: Bundle) -> Make:
    return lambda path: Path(shutil.copytree(fake_bundle.path, path))


def test_the_nearest_place_comes_first(places: dict[str, Path], make: Make) -> None:
    for place in ("demo", "own", "here"):
        made = make(places[place] / "model")
        assert find_bundle("model").samefile(made)


@pytest.mark.parametrize("place", ["here", "own", "demo"])
@pytest.mark.parametrize("name", ["gemma-2-2b-it", "gemma-2-2b-it-rk3588-w8a8-1.2.3"])
def test_what_a_bundle_was_made_for_may_be_left_out(places: dict[str, Path], make: Make, place: str, name: str) -> None:
    made = make(places[place] / "gemma-2-2b-it-rk3588-w8a8-1.2.3")
    make(places[place] / "gemma-2-2b-it-pirate-rk3588-w8a8-1.2.3")
    make(places[place] / "gemma-2-2b-rk3588-w8a8_g128-1.2.1b1")
    assert find_bundle(name).samefile(made)
    assert find_bundle("gemma-2-2b").name == "gemma-2-2b-rk3588-w8a8_g128-1.2.1b1"


def test_two_of_one_short_name_are_told_apart_by_the_user(places: dict[str, Path], make: Make) -> None:
    names = ["m-rk3588-w8a8-1.2.3", "m-rk3588-w8a8-1.3.0"]
    for name in names:
        make(places["own"] / name)
    with pytest.raises(UsageError) as caught:
        find_bundle("m")
    assert all(name in caught.value.hint for name in names)
    assert find_bundle(names[1]).name == names[1]
    assert set(named_bundles()) == set(names)
    make(places["here"] / "m")
    assert find_bundle("m").samefile(places["here"] / "m")


def test_each_listed_name_finds_its_bundle(places: dict[str, Path], make: Make) -> None:
    for place, names in {
        "here": ["a", "b-rk3588-w8a8-1.2.3"],
        "own": ["a", "b-rk3576-w4a16-1.3.0", "c"],
        "demo": ["c", "d-rk3588-w8a8-1.2.3"],
    }.items():
        for name in names:
            make(places[place] / name)
    (places["own"] / "again").symlink_to(places["own"] / "c")
    (places["own"] / ".d.partial-x").mkdir()
    (places["own"] / ".d.partial-x" / MANIFEST).touch()
    found = named_bundles()
    assert len(found) == 7
    assert [name for name, path in found.items() if not find_bundle(name).samefile(path)] == []
    assert {"a", "d"} <= set(found)


def test_a_folder_that_is_not_a_bundle_hides_none(places: dict[str, Path], make: Make) -> None:
    (places["here"] / "model").mkdir()
    made = make(places["own"] / "model")
    assert find_bundle("model").samefile(made)
    assert find_bundle("./model") == Path("model")
    shutil.rmtree(made)
    assert find_bundle("model") == Path("model")  # and open_bundle says what it is


@pytest.mark.parametrize("name", ["x", "x" * 5000, "a\0b", "caf\udce9", "*", "-", "~", "demo\x1b[31m"])
def test_a_name_without_a_bundle(places: dict[str, Path], name: str) -> None:
    with pytest.raises(BundleError, match="There is no bundle"):
        find_bundle(name)


def test_a_chat_with_a_folder_that_is_not_a_bundle(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """As in the folder of this project, which has a `board`."""
    (places["here"] / "board").mkdir()
    assert cli.main(["chat", "board"]) != 0
    said = capsys.readouterr().err
    assert "board is a folder here but not a bundle, and no host of ~/.ssh/config" in said
    assert "user@board" in said


def test_python_takes_names_too(places: dict[str, Path], make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(places["own"] / "model")
    opened: list[Path] = []

    def start(bundle: Bundle, *_: object) -> None:
        opened.append(bundle.path)
        raise BundleError("far enough")

    monkeypatch.setattr(model, "open_beside", start)
    for named in ("model", made, str(made)):
        with pytest.raises(BundleError, match="far enough"):
            rkruntime.open_model(named)
    with pytest.raises(BundleError):  # a Path is a path
        rkruntime.open_model(Path("model"))
    assert [path.samefile(made) for path in opened] == [True, True, True]


def test_the_message_names_the_nearest(places: dict[str, Path], make: Make) -> None:
    make(places["own"] / "gemma-2-2b-it-rk3588-w8a8-1.2.3")
    with pytest.raises(BundleError) as caught:
        find_bundle("gema-2-2b-it")
    assert "Did you mean gemma-2-2b-it?" in caught.value.hint


def test_a_place_that_cannot_be_read_is_passed_over(
    places: dict[str, Path], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(places["demo"] / "model")
    places["own"].rmdir()
    places["own"].write_text("a file")
    assert find_bundle("model").samefile(made)
    gone = places["here"] / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert find_bundle("model").samefile(made)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "is a checkpoint, not a bundle. Convert it first"),
        ("adapter_config.json", "is an adapter, not a bundle."),
        (f"one/{MANIFEST}", "is a folder of bundles, not a bundle. Name one of them: one."),
        ("other", "is not a bundle: it has no rkedge.yaml."),
    ],
)
def test_what_is_not_a_bundle_is_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"There is no folder .*none\.$"):
        open_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=r"file is not a folder\.$"):
        open_bundle(tmp_path / "file")


@pytest.mark.parametrize("command", ["run", "chat", "serve", "firstrun", "inspect", "push", "rm"])
def test_every_command_takes_a_name(
    command: str, places: dict[str, Path], make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is damaged, so that each of them says where it was found and stops."""
    damaged = make(places["own"] / "model-rk3588-w8a8-1.2.3")
    (damaged / MANIFEST).write_text("schema: other\n")
    assert cli.main([command, "model", *(["me/model"] if command == "push" else [])]) == BundleError.exit_code
    assert "has the schema 'other'" in capsys.readouterr().err
    assert cli.main([command, "none", *(["me/model"] if command == "push" else [])]) == BundleError.exit_code
    assert "There is no bundle" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "chat", "serve", "up", "firstrun", "inspect", "push", "rm"])
def test_an_empty_name_is_not_the_current_folder(
    command: str,
    places: dict[str, Path],
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As of a variable that was not set."""
    made = make(places["own"] / "model")
    monkeypatch.chdir(made)
    more = {"push": ["me/model"], "rm": ["--yes"]}.get(command, [])
    assert cli.main([command, "", *more]) == UsageError.exit_code
    assert "it is empty" in capsys.readouterr().err
    assert open_bundle(made)
    with pytest.raises(UsageError, match="is not a path"):
        open_bundle("")


def test_list(places: dict[str, Path], make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert "`rkedge demo` makes two" in capsys.readouterr().err
    made = make(places["own"] / "model-rk3588-w8a8-1.2.3")
    (make(places["own"] / "broken") / MANIFEST).write_text("[")
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["broken", "model"]
    assert "damaged" in lines[0]
    assert cli.main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["model"]["path"] == str(made)
    assert "is not YAML" in rows["broken"]["error"]


# -- rm --


def test_rm_takes_the_bundle_and_nothing_else(places: dict[str, Path], make: Make) -> None:
    made = make(places["own"] / "model")
    beside = make(places["own"] / "other")
    assert cli.main(["rm", "model", "--yes"]) == 0
    assert not made.exists()
    assert open_bundle(beside)
    assert cli.main(["rm", "model", "--yes"]) == BundleError.exit_code


def test_rm_leaves_what_is_not_listed(places: dict[str, Path], make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(places["own"] / "model")
    (made / "notes.txt").write_text("mine")
    (made / "report").mkdir(exist_ok=True)
    (made / "report" / "mine").write_text("mine")
    assert cli.main(["rm", "model", "-y"]) == 0
    assert "notes.txt, report" in capsys.readouterr().out
    assert sorted(path.name for path in made.rglob("*")) == ["mine", "notes.txt", "report"]


@pytest.mark.parametrize("answer", ["", "n", "no", "x", "y"])
def test_rm_asks(places: dict[str, Path], make: Make, answer: str) -> None:
    made = make(places["own"] / "model")
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\nn\n".encode())
    done = subprocess.run(
        [sys.executable, "-m", "rkruntime.cli", "rm", "model"],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert str(made) in done.stdout
    assert made.exists() == (answer != "y")


def test_rm_does_not_take_silence_for_a_yes(places: dict[str, Path], make: Make) -> None:
    made = make(places["own"] / "model")
    done = subprocess.run(
        [sys.executable, "-m", "rkruntime.cli", "rm", "model"],
        input="y\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == UsageError.exit_code
    assert made.exists()


@pytest.mark.parametrize("what", ["folder", "file", "checkpoint", "damaged", "home"])
def test_rm_removes_only_bundles(
    places: dict[str, Path], make: Make, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = places["here"] / "target"
    if what == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "config.json").write_text("{}")
        if what == "damaged":
            (target / MANIFEST).write_text("schema: rkedge-bundle/1\nfiles: {}\n")
    assert cli.main(["rm", "target", "-y"]) == BundleError.exit_code
    assert cli.main(["rm", "..", "-y"]) == BundleError.exit_code
    assert target.exists()
    assert "rm -r" not in capsys.readouterr().err


def test_rm_of_a_link_removes_the_link(places: dict[str, Path], make: Make, tmp_path: Path) -> None:
    made = make(tmp_path / "elsewhere")
    (places["own"] / "model").symlink_to(made)
    assert cli.main(["rm", "model", "-y"]) == 0
    assert not (places["own"] / "model").is_symlink()
    open_bundle(made).verify()


def test_rm_does_not_follow_links_within_a_bundle(places: dict[str, Path], make: Make, tmp_path: Path) -> None:
    made = make(places["own"] / "model")
    bundle = open_bundle(made)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in bundle.manifest.files:
        (outside / Path(name).name).write_text("mine")
    listed = dict(bundle.manifest.files)
    one = next(iter(listed.values()))
    listed["report/deep/file"] = one
    listed["linked/file"] = listed["model.bin"] = one
    (outside / "file").write_text("mine")
    (made / "linked").symlink_to(outside)
    (made / "model.bin").symlink_to(outside / "file")
    object.__setattr__(bundle.manifest, "files", listed)
    assert remove_bundle(bundle) == ["linked"]
    assert (outside / "file").read_text() == "mine"
    assert len(list(outside.iterdir())) == len(bundle.manifest.files) - 2


@pytest.mark.parametrize(
    "name", [".", "./", "", "..", "a/..", "/", "a//b", "a" * 300, f"a/{'b' * 300}", "a\nb", "-rf", MANIFEST]
)
def test_rm_with_a_manifest_that_lists_anything(places: dict[str, Path], make: Make, name: str) -> None:
    """It is refused as a whole, or the bundle goes."""
    made = make(places["own"] / "model")
    text = (made / MANIFEST).read_text()
    record = f"{{sha256: {'0' * 64}, size: 1}}"
    (made / MANIFEST).write_text(text.replace("files:\n", f"files:\n  {json.dumps(name)}: {record}\n", 1))
    status = cli.main(["rm", "model", "--yes"])
    assert status in (0, BundleError.exit_code)
    assert made.exists() == (status != 0)
    assert (status == 0) == (name in ("a" * 300, f"a/{'b' * 300}", "a\nb", "-rf", MANIFEST))
    assert places["own"].exists()


def test_rm_says_each_name_in_one_line(places: dict[str, Path], make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(places["own"] / "a\nerror: b\x1b[2J")
    (made / "c\nfalse").touch()
    for _ in range(2):
        assert cli.main(["rm", made.name, "--yes"]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert r"a\nerror: b\x1b[2J" in out
        if (made / "c\nfalse").exists():
            assert r"c\nfalse" in out
            shutil.rmtree(made)
            make(made)


def test_rm_that_may_not_is_an_error_with_a_reason(
    places: dict[str, Path], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(places["own"] / "model")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(RKEdgeError, match="cannot be removed: Permission denied"):
        remove_bundle(open_bundle(made))
    assert open_bundle(made)  # the manifest goes last
