"""What is read is bounded and regular; files that exist are complete."""

import errno
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from rkruntime.bundle.rkllm_file import read_rkllm
from rkruntime.engine.engine import Engine
from rkruntime.engine.loading import LoadOptions, check_readable
from rkruntime.errors import HostError, OutputError, RKEdgeError
from rkruntime.files import atomic_file, atomic_folder, open_regular, read_regular, set_aside, sha256_file, umask
from rkruntime.library.identify import identify, inspect_library
from rkruntime.text.conversation import read_conversation, write_conversation


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    with atomic_folder(final) as partial:
        (partial / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "bundle") as partial:
        (partial / "a").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(OutputError, match="exists already"), atomic_folder(tmp_path / "bundle"):
        pass


def test_a_dangling_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already"), atomic_folder(tmp_path / "bundle"):
        pass


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder") as caught, atomic_folder(tmp_path / "no" / "bundle"):
        pass
    assert "mkdir" in caught.value.hint


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="disk is full"), atomic_folder(tmp_path / "bundle"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_file_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    final = tmp_path / "f"
    final.write_text("old")
    with pytest.raises(ValueError, match="x"), atomic_file(final) as partial:
        partial.write_text("half")
        raise ValueError("x")
    assert final.read_text() == "old"
    with atomic_file(final) as partial:
        partial.write_text("new")
    assert final.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "\udce9" * 255])
def test_any_name_that_a_file_can_have_can_be_written(tmp_path: Path, name: str) -> None:
    with atomic_file(tmp_path / name) as partial:
        partial.write_text("whole")
    with atomic_folder(tmp_path / f"{name[:-1]}y") as folder:
        (folder / "file").touch()
    assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    seen: list[int] = []
    # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "f", seen.append) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert sum(seen) == 3


def _stranger(kind: str, path: Path) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to(f"/dev/{kind}")
    return path


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "zero", "null", "full", "tty"])
@pytest.mark.parametrize("read", [open_regular, sha256_file, lambda path: read_regular(path, 10)])
def test_only_regular_files_are_read(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    descriptors = os.listdir("/proc/self/fd")
    # A socket is not opened at all.
    with pytest.raises(OSError, match=r"not a regular file|No such device|Is a directory"):
        read(_stranger(kind, tmp_path / "file"))
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    assert read_regular(path, 4) == b"1234"
    with pytest.raises(OSError, match="has more than 3 bytes") as caught:
        read_regular(path, 3)
    assert caught.value.errno == errno.EFBIG
    assert read_regular(Path("/proc/self/stat"), 10_000)  # its size says 0


@pytest.mark.parametrize("mask", [0, 0o022, 0o027, 0o777])
def test_the_umask_is_found_and_never_set(monkeypatch, mask):
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)
            assert umask() == mask
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "read",
    [
        identify,
        inspect_library,
        read_rkllm,
        read_conversation,
        lambda path: write_conversation(path, {}),
        lambda path: Engine.load(LoadOptions(library=path, model=path)),
        check_readable,
    ],
)
@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "socket"])
def test_what_has_no_end_is_not_read(read: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    """A FIFO waits for a writer, and a device fills the memory."""
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.close()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, before[1]))
    try:
        with pytest.raises(RKEdgeError):
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_room_is_set_aside_where_the_file_system_can(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1)  # this file system can, or else this test could not tell
        set_aside(file.fileno(), 1 << 20)
        state = os.fstat(file.fileno())
        assert (state.st_size, state.st_blocks * 512 >= 1 << 20) == (1, True)
        file.write(b"ab")
    assert (tmp_path / "file").read_bytes() == b"ab"
    with (tmp_path / "none").open("wb") as file:
        set_aside(file.fileno(), 1 << 62)  # more than there is anywhere
        file.write(b"ab")
    assert (tmp_path / "none").read_bytes() == b"ab"
    for end in os.pipe():
        set_aside(end, 1 << 20)
        os.close(end)
