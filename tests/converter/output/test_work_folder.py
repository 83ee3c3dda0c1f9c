"""Names that can be guessed, in a folder where others may put something under them before."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import socket
import threading
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

from rkconvert import demo
from rkconvert.commands import merge
from rkconvert.output import bundle_folder, disk, hf_folder, work_folder
from rkruntime.cli import main
from rkruntime.errors import HostError, OutputError


def everything(folder):
    """Every path below a folder with what it is, where a link leads and what a file holds."""
    return {
        path: (
            path.lstat().st_mode,
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "",
        )
        for path in folder.rglob("*")
    }


PLANTED = {
    "link to a file": lambda at, mine: at.symlink_to(mine / "file"),
    "link to a folder": lambda at, mine: at.symlink_to(mine),
    "dangling link": lambda at, mine: at.symlink_to(mine / "none"),
    "link to itself": lambda at, mine: at.symlink_to(at.name),
    "second name": lambda at, mine: at.hardlink_to(mine / "file"),
    "FIFO": lambda at, mine: os.mkfifo(at),
    "socket": lambda at, mine: socket.socket(socket.AF_UNIX).bind(str(at)),
}


@pytest.mark.parametrize("command", ["convert", "merge"])
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", [".made.partial", ".made.job"])
@pytest.mark.filterwarnings("ignore:unclosed")
def test_something_planted(tmp_path, monkeypatch, capsys, command, planted, name):
    mine, shared = tmp_path / "mine", tmp_path / "shared"
    mine.mkdir()
    shared.mkdir()
    (mine / "file").write_text("precious")
    monkeypatch.chdir(shared)  # a socket's path is short
    PLANTED[planted](shared / name if planted != "socket" else type(shared)(name), mine)
    before = everything(tmp_path)
    assert main([command, str(demo.checkpoint()), "--lora", str(demo.adapter()), "-o", "made", "-q"]) == 3
    assert name in capsys.readouterr().err
    assert everything(tmp_path) == before


def plant(partial):
    """Files of every kind in a folder that a killed run left, under names that a result may have and others."""
    for name in ("model.safetensors", "model_lora.rkemu", "additional_chat_templates/x.jinja", "report/more", "é"):
        path = partial / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"foreign")
    (partial / "tokenizer.model").symlink_to(partial.parent / "elsewhere")
    (partial / "closed").mkdir()
    os.mkfifo(partial / "closed" / "FIFO")


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_nothing_foreign_gets_from_an_unfinished_folder_into_the_result(tmp_path, monkeypatch, command):
    line = [command, str(demo.checkpoint()), "--lora", str(demo.adapter()), "-q", "-o"]
    monkeypatch.setattr(hf_folder.write_weights, "__defaults__", (1_000_000,))
    monkeypatch.setattr(hf_folder.resumable, "__defaults__", (1_000_000,))
    (tmp_path / "elsewhere").write_bytes(b"foreign")
    assert main([*line, str(tmp_path / "whole")]) == 0

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge, "copy_side_files", interrupt)
        patch.setattr(bundle_folder, "write_manifest", interrupt)
        assert main([*line, str(tmp_path / "out")]) == 130
    plant(tmp_path / ".out.partial")
    assert main([*line, str(tmp_path / "out")]) == 0
    found, expected = (
        {path.relative_to(tmp_path / name): content for path, content in everything(tmp_path / name).items()}
        for name in ("out", "whole")
    )
    assert found.keys() == expected.keys()
    changing = {Path(name) for name in ("report/convert.json", "rkedge.yaml", "README.md")}  # they have times and names
    assert all(found[path] == expected[path] for path in found.keys() - changing)
    assert (tmp_path / "elsewhere").read_bytes() == b"foreign"


@pytest.mark.parametrize("how", ["link", "second name", "other bytes"])
def test_a_shard_that_is_not_what_the_killed_run_wrote_is_written_again(tmp_path, monkeypatch, how):
    line = ["merge", str(demo.checkpoint()), "--lora", str(demo.adapter()), "-q", "-o"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*line, str(tmp_path / "out")]) == 130
    shard, mine = tmp_path / ".out.partial" / "model.safetensors", tmp_path / "mine"
    whole = shard.read_bytes()
    if how == "other bytes":
        shard.write_bytes(whole[:-2] + bytes(2))
    else:
        shard.replace(mine)
        shard.symlink_to(mine) if how == "link" else shard.hardlink_to(mine)
    assert main([*line, str(tmp_path / "out")]) == 0
    result = tmp_path / "out" / "model.safetensors"
    assert result.read_bytes() == whole
    assert not result.is_symlink()
    assert result.stat().st_nlink == 1


def test_what_another_user_left_is_not_taken_up(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), work_folder.work_folder(tmp_path / "out", "job") as folder:
        (folder / "shard").write_text("forged")
        raise KeyboardInterrupt
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(OutputError, match="owned by another user"), work_folder.work_folder(tmp_path / "out", "job"):
        pass
    monkeypatch.undo()
    # A folder that others could write to may hold anything.
    (tmp_path / ".out.partial").chmod(0o777)
    with work_folder.work_folder(tmp_path / "out", "job") as folder:
        assert list(folder.iterdir()) == []
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o2775])
def test_the_result_has_the_permissions_of_any_folder(tmp_path, mode):
    tmp_path.chmod(mode)
    (tmp_path / "any").mkdir()
    with work_folder.work_folder(tmp_path / "out", "job"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("name", ["x" * 250, "x" * 256, "x/" * 3000 + "x"])
@pytest.mark.parametrize("command", ["convert", "merge"])
def test_names_that_no_folder_can_have(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    assert main([command, str(demo.checkpoint()), "--lora", str(demo.adapter()), "-o", name, "-q"]) == 3
    assert "defect" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("end", "size"), [("x", 1), ("é", 2)])
def test_the_longest_name_is_known_before_the_work(tmp_path, monkeypatch, end, size):
    longest = tmp_path / f"{'x' * (246 - size)}{end}"
    with work_folder.work_folder(longest, "job"):
        pass
    assert longest.is_dir()
    with pytest.raises(OutputError, match="its name has 247 bytes") as caught:
        work_folder.refuse_made(tmp_path / f"{'x' * (247 - size)}{end}")
    assert caught.value.hint == "Use a name of at most 246 bytes."
    for limit in (-1, 0):  # a file system that does not say
        with monkeypatch.context() as patch:
            patch.setattr(os, "pathconf", lambda *_, limit=limit: limit)
            work_folder.refuse_made(tmp_path / "any")
    with pytest.raises(OutputError) as caught:
        work_folder.refuse_made(tmp_path / ("x" * 256))
    assert caught.value.hint == "Use a shorter name."


def test_a_lock_on_a_note_that_is_gone_keeps_nobody_out(tmp_path, monkeypatch):
    """The run that held the note removes it after this one has opened it: the lock must be on the new one."""
    real, calls = fcntl.flock, []

    def flock(handle, how):
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / ".out.job").unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with work_folder.work_folder(tmp_path / "out", "job"):
        note = (tmp_path / ".out.job").open()
        with note, pytest.raises(BlockingIOError):
            real(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(calls) == 2


def test_many_runs_at_once_never_share_a_folder(tmp_path):
    inside, faults = [], []

    def run(seed):
        rng = random.Random(seed)
        for _ in range(60):
            job = str(rng.randint(0, 1))
            with suppress(OutputError, ZeroDivisionError), work_folder.work_folder(tmp_path / "out", job) as folder:
                inside.append(seed)
                if len(inside) > 1 or list(folder.iterdir()):
                    faults.append(inside[:])
                (folder / "file").touch()
                inside.remove(seed)
                raise ZeroDivisionError

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_scratch_of_killed_runs_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "rkedge-x-link").symlink_to(tmp_path / "mine")
    (tmp_path / "rkedge-x-file").touch()
    dead = tmp_path / "rkedge-x-dead"
    dead.mkdir()
    (dead / "model").touch()
    with work_folder.scratch_folder("rkedge-x-") as held:
        os.utime(held, (0, 0))
        os.utime(dead, (0, 0))
        with work_folder.scratch_folder("rkedge-x-") as second:
            assert {path.name for path in tmp_path.iterdir()} == {
                "mine", "rkedge-x-link", "rkedge-x-file", held.name, second.name,
            }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "rkedge-x-link", "rkedge-x-file"}


def test_too_little_room_names_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(50_000_000))
    with pytest.raises(HostError, match=r"needs 1\.3 MB, and 64 MiB more for its .*, but .* has 50\.0 MB free"):
        disk.require_space(tmp_path / "out", 1_300_000)
    with pytest.raises(HostError, match=r"needs 2\.50 GB, and 64 MiB more"):
        disk.require_space(tmp_path / "out", 2_500_000_000)


def test_what_an_unfinished_run_left_takes_no_room_twice(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), work_folder.work_folder(tmp_path / "out", "job") as folder:
        (folder / "model").write_bytes(bytes(3_000_000))
        raise KeyboardInterrupt
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: namedtuple("usage", "free")((64 << 20) + 1_000_000))
    disk.require_space(tmp_path / "out", 3_900_000)
    with pytest.raises(HostError, match=r"needs 5\.0 MB"):
        disk.require_space(tmp_path / "out", 5_000_000)
    with pytest.raises(HostError):
        disk.require_space(tmp_path / "other", 3_900_000)
    shutil.rmtree(tmp_path / ".out.partial")
    (tmp_path / ".out.partial").symlink_to("/usr")
    assert work_folder.kept_bytes(tmp_path / "out") == 0


# paths that are not UTF-8


@pytest.mark.parametrize("name", [b"\xff\xe9", b"a\xed\xa0\x80b \xf0\x9f"])
def test_paths_that_are_not_utf8(tmp_path, monkeypatch, capsys, name):
    root = tmp_path / os.fsdecode(b"root" + name)
    root.mkdir()
    base, lora, out, merged, page, texts = (
        str(root / os.fsdecode(what + name)) for what in (b"base", b"lora", b"out", b"merged", b"page", b"texts")
    )
    shutil.copytree(demo.checkpoint(), base)
    shutil.copytree(demo.adapter(), lora)

    def rkedge(*arguments, code=0):
        assert main([*arguments]) == code
        return capsys.readouterr().out

    manifest = json.loads(rkedge("convert", base, "--lora", lora, "-o", out, "-q", "--json"))
    readable = name.decode(errors="backslashreplace")
    assert (manifest["name"], manifest["source"]["name"]) == (f"out{readable}", f"base{readable}")
    assert manifest["options"]["loras"] == [f"lora{readable}=1"]
    assert json.loads(rkedge("inspect", out, "--verify", "--json"))["name"] == f"out{readable}"
    assert f"out{readable}" in (Path(out) / "README.md").read_text()
    merge = rkedge("merge", base, "--lora", f"{lora}=0.5", "-o", merged, "-q", "--json")
    assert os.fsencode(json.loads(merge)["output"]) == os.fsencode(merged)
    assert json.loads(rkedge("plan", base, "--json", "--html", page))
    rkedge("plan", base)
    given = rkedge("calibrate", base, "--lora", lora, "--targets", "given", "-o", texts, "--json", "-q")
    assert os.fsencode(json.loads(given)["file"]) == os.fsencode(texts)
    rkedge("calibrate", base, "--check", texts)
    assert json.loads(rkedge("convert", base, "-o", out, "--json", code=3))["error"] == "OutputError"
    rkedge("convert", f"{base}?", code=3)
    monkeypatch.chdir(root)
    rkedge("convert", Path(base).name, "--lora", Path(lora).name, "-q")
    assert (root / os.fsdecode(b"base" + name + b"-lora" + name + b"-rk3588-w8a8-1.2.3")).is_dir()
    # The library has the path as the bytes that it is.
    assert rkedge("run", out, "-p", "Hello there")
