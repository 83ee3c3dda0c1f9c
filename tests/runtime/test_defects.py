"""What people are told of exceptions that nobody expected."""

from __future__ import annotations

import ctypes
import errno
import gzip
import io
import os
import resource
from pathlib import Path

import pytest

from rkruntime.defects import is_defect, typed
from rkruntime.errors import HostError, RKEdgeError, UsageError
from rkruntime.files import read_error, write_error


def raised(work: object, *args: object) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever Python raises)
        work(*args)  # type: ignore[operator]
    return caught.value


def test_our_own_errors_are_left_as_they_are() -> None:
    error = UsageError("what", hint="how.")
    assert typed(error) is error


def test_a_machine_that_lacks_something_is_no_defect() -> None:
    for error in (MemoryError(), raised(__import__, "rkedge_has_no_such_module"), OSError(errno.EIO, "the disk")):
        assert isinstance(typed(error), HostError)
        assert not is_defect(typed(error))


def test_an_error_that_a_library_raises_without_a_number_keeps_its_words() -> None:
    for error in (raised(ctypes.CDLL, "librkedge-has-none.so"), raised(gzip.decompress, b"no gzip, and no header")):
        assert isinstance(error, OSError)
        assert error.errno is None
        assert typed(error).message == f"{error}."
        assert isinstance(typed(error), HostError)


def test_the_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    found = typed(raised((tmp_path / "nothing").read_bytes))
    assert found.message == f"No such file or directory: {tmp_path}/nothing."
    assert found.hint == "Check the spelling of the path."


def test_files_that_run_out_have_a_next_step() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        error = raised(os.pipe)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isinstance(error, OSError)
    for found in (typed(error), read_error("a", error), write_error(Path("a"), error)):
        assert "Too many open files." in found.message
        assert "ulimit -n" in found.hint


def test_paths_that_no_machine_has(tmp_path: Path) -> None:
    for error in (raised(Path("~nobody-of-this-name/x").expanduser), raised(os.stat, "a\0b")):
        assert isinstance(typed(error), UsageError)
    (tmp_path / "loop").symlink_to("loop")
    assert not is_defect(typed(raised((tmp_path / "loop").resolve, True)))


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("x"), ValueError("x"), AssertionError(), TimeoutError(), io.UnsupportedOperation("x")],
)
def test_what_remains_is_a_defect(error: Exception) -> None:
    found = typed(error)
    assert is_defect(found)
    assert found.exit_code == RKEdgeError.exit_code == 1
    assert type(error).__name__ in found.message
