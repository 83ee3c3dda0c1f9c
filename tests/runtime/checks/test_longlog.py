"""Logs of any size are read to their end in bounded memory, and what is between head and tail counts."""

from __future__ import annotations

import io
import random
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import diagnosis_corpus as corpus

from rkruntime.checks import longlog
from rkruntime.checks.diagnosis import diagnose
from rkruntime.checks.failures import table
from rkruntime.checks.longlog import ReadLog, read_log, read_text

LINE = "E rkllm: invalid rkllm model! 段错误"
WORDS = [
    "request",
    "served",
    "token",
    "user",
    "model",
    "done",
    "ok",
    "session",
    "started",
    "queue",
    "prompt",
    "cache",
    "hit",
    "miss",
]


def ordinary(count: int, seed: int = 0) -> Iterator[str]:
    """Lines of a server that nothing happens to, no two the same."""
    rng = random.Random(seed)
    for number in range(count):
        said = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(6))
        yield f"2026-01-01 12:{number // 60 % 60:02}:{number % 60:02}.{rng.randrange(1000):03} INFO [{number}] {said}"


def log_with(middle: str, lines: int = 20_000) -> str:
    return "\n".join([*ordinary(lines), middle, *ordinary(lines, 1)])


def read(data: bytes) -> ReadLog:
    return read_log(io.BytesIO(data), table())


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log is long from some kilobytes on."""
    monkeypatch.setattr(longlog, "HEAD", 4096)
    monkeypatch.setattr(longlog, "TAIL", 8192)


class Pipe(io.RawIOBase):
    """A stream that cannot seek, of any length without holding it, in pieces as a pipe gives them."""

    def __init__(self, *parts: tuple[bytes, int]) -> None:
        super().__init__()
        self._parts = list(parts)
        self.most = 0

    def read(self, size: int = -1) -> bytes:
        self.most = max(self.most, size)
        if not self._parts:
            return b""
        piece, times = self._parts.pop(0)
        if times > 1:
            self._parts.insert(0, (piece, times - 1))
        if len(piece) > size:
            self._parts.insert(0, (piece[size:], 1))
        return piece[:size]

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("seek")


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_a_hundred_megabytes_are_read_within_bounds(where: str) -> None:
    calm, failure = (b"nothing to see here\n" * 3000, 800), (f"\n{LINE}\n".encode(), 1)
    parts = {"start": [failure, calm, calm], "middle": [calm, failure, calm], "end": [calm, calm, failure]}
    stream = Pipe(*parts[where])
    tracemalloc.start()
    found = read_log(stream, table())  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert diagnose(found).class_ == "model-file-invalid"
    assert (found.skipped_lines, found.skipped_bytes) == (0, 0)
    assert stream.most <= longlog.TAIL
    assert peak < 40e6


@pytest.mark.parametrize("case", corpus.everything(), ids=lambda case: case.id)
def test_a_failure_in_the_middle_is_told_as_in_a_short_log(case: corpus.Case, narrow: None) -> None:
    text = log_with("\n".join(case.log), 400)
    found, expected = diagnose(read_text(text, table())), diagnose(ReadLog(text))
    assert (found.class_, found.confidence) == (expected.class_, expected.confidence)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_ends_of_lines(encoding: str, end: str) -> None:
    text = end.join(["第一行：加载模型", *ordinary(20_000), LINE, *ordinary(20_000, 1)])
    assert LINE in read(text.encode(encoding)).text


@pytest.mark.parametrize("before", [*range(0, 700, 37)])
def test_a_failure_across_a_border_is_found(before: int, narrow: None) -> None:
    """Of the head and of the tail, and within lines that have no end."""
    for start in (4096 - 350 + before, 40_000 - 8192 - 350 + before):
        for filler in ("x ", "a line\n"):
            data = (filler * 40_000)[:start] + f" {LINE} " + (filler * 40_000)[: 40_000 - start]
            assert "invalid rkllm model" in " ".join(read(data.encode()).text.split()), (start, filler)


@pytest.mark.parametrize(
    "filler",
    [
        "x y z ",
        "x",
        "\x1b[31m",
        "\0",
        "\\n",
        "{same}",
        "(" * 50,
        pytest.param("E rkllm: failed ", marks=pytest.mark.long),
    ],
)
def test_a_line_without_end(filler: str) -> None:
    data = filler.encode() * (6_000_000 // len(filler))
    found = read(data + f" {LINE} ".encode() + data)
    assert diagnose(found).class_ == "model-file-invalid"


def test_what_is_skipped_is_counted(monkeypatch: pytest.MonkeyPatch, narrow: None) -> None:
    """Lines that are all different, with room for the first thousand bytes of them."""
    monkeypatch.setattr(longlog, "_DISTINCT", 1000)
    rng = random.Random(3)
    lines = ["".join(rng.choices("ghijlmoqstvwxyz ", k=80)) for _ in range(1000)]
    found = read("\n".join(lines).encode())
    text = found.text.splitlines()
    middle = [line for line in lines if line not in text]
    # Those at a border are cut, and those that were searched had nothing to be kept for.
    assert len(middle) - 1000 // 80 - 3 <= found.skipped_lines <= len(middle)
    assert found.skipped_bytes == pytest.approx(80 * found.skipped_lines, abs=100)
    assert f"{found.skipped_lines:,} lines" in diagnose(found).not_read
    assert diagnose(read("\n".join(lines[:100]).encode())).not_read == ""


def test_a_line_of_rkllm_is_found_when_there_are_too_many_others(monkeypatch: pytest.MonkeyPatch, narrow: None) -> None:
    monkeypatch.setattr(longlog, "_DISTINCT", 10_000)
    rng = random.Random(4)
    lines = ["".join(rng.choices("ghijlmoqstvwxyz ", k=80)) for _ in range(1000)]
    lines[500] = LINE
    assert diagnose(read("\n".join(lines).encode())).class_ == "model-file-invalid"


def test_repeats_of_pieces_without_end_are_searched_within_bounds(
    monkeypatch: pytest.MonkeyPatch, narrow: None
) -> None:
    """Each block of an endless line counts as one line: seventeen of each kind would be most of the log."""
    bounds = {"_DISTINCT": 40_000, "_REPEATED": 30_000}
    for name, value in bounds.items():
        monkeypatch.setattr(longlog, name, value)
    searched = []
    look = longlog._Middle._look

    def counted(middle: longlog._Middle, places: list[tuple[longlog._Place, longlog._Around]]) -> set[int]:
        searched.extend(len(around.line) for _, around in places)
        return look(middle, places)

    monkeypatch.setattr(longlog._Middle, "_look", counted)
    found = read(b"rknpu says nothing " * 60_000)
    assert not diagnose(found).explained
    # The last block of each kind is searched besides.
    assert sum(searched) < 40_000 + 20_000 + 30_000 + 20 * 8192
    assert found.skipped_bytes


def test_the_last_of_many_repeats_is_kept(narrow: None) -> None:
    versions = [f"I rkllm: rkllm-runtime version: 1.2.{at % 3}, rknpu driver version: 0.9.{at}" for at in range(3000)]
    text = "\n".join([*ordinary(300), *versions, *ordinary(300, 1)])
    found = read(text.encode()).text
    assert versions[0] in found
    assert versions[-1] in found
    assert versions[1500] not in found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=300), st.integers(1, 400), st.binary(max_size=300))
def test_any_bytes_are_read(narrow: None, piece: bytes, times: int, end: bytes) -> None:
    data = piece * times + end
    assert isinstance(diagnose(read(data)).class_, str)
