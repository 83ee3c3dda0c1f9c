"""Bytes of any kind and amount become lines."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.checks import logtext
from rkruntime.checks.diagnosis import diagnose
from rkruntime.checks.failures import table
from rkruntime.checks.longlog import read_log

LINE = "E rkllm: invalid rkllm model! 段错误"


def read(data: bytes) -> str:
    return read_log(io.BytesIO(data), table()).text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
def test_encodings(encoding: str) -> None:
    text = f"第一行：加载模型\n{LINE}\n第三行：完成，内存不足，请检查\n"
    assert LINE in logtext.clean_lines(read(text.encode(encoding)))


def test_damaged_bytes_do_not_matter() -> None:
    data = b"\xff\xfe\x00\x80"[2:] + LINE.encode() + b"\xc3\x28 \xf0\n\x80"
    assert diagnose(logtext.decode(data)).class_ == "model-file-invalid"


@pytest.mark.parametrize(
    "size", [0, 1, 5, logtext.HEAD - 1, logtext.HEAD, logtext.HEAD + 1, logtext.HEAD + logtext.TAIL]
)
def test_a_log_that_fits_is_read_whole(size: int) -> None:
    data = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    assert read(data) == data.decode()


def test_two_byte_characters_survive_the_cut() -> None:
    text = "a line\n" * 400_000 + LINE
    for odd in ("", "x"):
        assert LINE in read((text + odd).encode("utf-16"))


def test_escapes_and_controls_go() -> None:
    raw = "\x1b[0;1;31mE rkllm:\x1b[0m \x1b]0;title\x07a\x1b(Bb\x08c ^[[32md \\u001b[0me [0;33mf\x7f\u200b"
    assert logtext.clean_lines(raw) == ["E rkllm: abc d e f"]


def test_breaks_of_all_kinds() -> None:
    assert logtext.clean_lines("1\r\n2\r3\n\n4\\n5\\r\\n6\x0b7\u20288") == list("12345678")


def test_json_characters() -> None:
    line = json.dumps({"log": "段错误 ‘x’\n"})
    assert logtext.clean_lines(line)[0].endswith("段错误 ‘x’")


def test_long_lines_are_cut_with_overlap() -> None:
    text = "x" * 3900 + LINE + "y" * 9000
    lines = logtext.clean_lines(text)
    assert max(map(len, lines)) <= 4000
    assert any(LINE in line for line in lines)


@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=120), max_size=12))
def test_unwrapping_loses_nothing(lines: list[str]) -> None:
    for at, whole in logtext.unwrapped(lines):
        joined = "".join(lines[at:]).replace(" ", "")
        assert joined.startswith(whole.replace(" ", ""))


@given(st.binary(max_size=4000))
def test_any_bytes_become_lines(data: bytes) -> None:
    for line in logtext.clean_lines(read(data)):
        assert line.isprintable() or "\t" in line or not line.isascii()
