"""What the worker says, and what its output says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkconvert.toolkit.events import Done, Failure, Notice, Progress, Stage, StageDone, WorkerStarted, parse_event
from rkconvert.toolkit.output import Output
from rkruntime.errors import ToolkitError


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ({"event": "started", "python": "3.8.18", "pid": 5}, WorkerStarted("3.8.18", 5)),
        ({"event": "stage", "stage": "load"}, Stage("load")),
        ({"event": "stage_done", "stage": "load", "seconds": 1.5}, StageDone("load", 1.5)),
        ({"event": "stage_done", "stage": "load", "seconds": 2}, StageDone("load", 2)),
        ({"event": "done"}, Done()),
        ({"event": "failure", "kind": "exit", "stage": "build", "message": "m"}, Failure("exit", "build", "m")),
    ],
)
def test_events(line: dict[str, Any], event: object) -> None:
    assert parse_event(json.dumps(line).encode()) == event


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"[]", b'"done"', b"null", b'{"event": "made up"}', b'{"event": ["done"]}', b'{"event": {}}',
        b'{"event": "done", "more": 1}', b'{"event": "stage"}', b'{"event": "stage", "stage": 1}',
        b'{"event": "started", "python": "3", "pid": true}',
        b'{"event": "stage_done", "stage": "load", "seconds": "1"}', b'{"event": "stage", "stage": "x"}',
        b'{"event": "stage_done", "stage": "load", "seconds": 1' + b"0" * 400 + b"}", b"\xff\xfe", b"[" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_refused(line: bytes) -> None:
    with pytest.raises(ToolkitError, match="does not understand"):
        parse_event(line)


def feed(tmp_path: Path, *pieces: bytes) -> tuple[Output, list[Progress | Notice]]:
    with Output((tmp_path / "log").open("wb", buffering=0)) as output:
        events = [event for piece in pieces for event in output.feed(piece)]
        return output, [*events, *output.finish()]


# Lines of toolkits 1.1.4 to 1.3.0 as people put them into issues and documents.
REAL = """INFO: rkllm-toolkit version: 1.2.3
Building model: 100%|\u2588\u2588\u2588\u2588| 371/371 [00:05<00:00, 69.25it/s]
Generating train split: 21 examples [00:00, 2604.93 examples/s]
Optimizing model:   0%|                                  | 0/28 [00:00<?, ?it/s]\rOptimizing model:  88%|\u2588\u258d      | 28/32 [1:04:19<09:28, 142.23s/it]
Building model: 100%|??????????????????????| 2331/2331 [00:04<00:00, 502.95it/s]
WARNING: The bos token has two ids: 151646 and 151643, please ensure that the bos token ids agree!
INFO: Setting max_context_limit to 4096
[=================================================>] 597/597 (100%)
[==========>                                       ] 120/597 (20%)
ERROR: target_platform: rk3588 not support quantized_dtype: w4a16!
"""  # noqa: E501 - as they were


def test_real_lines(tmp_path: Path) -> None:
    output, events = feed(tmp_path, REAL.encode())
    assert output.version == "1.2.3"
    assert [event for event in events if isinstance(event, Progress)] == [
        Progress("Building model", 371, 371),
        Progress("Optimizing model", 0, 28),
        Progress("Optimizing model", 28, 32),
        Progress("Building model", 2331, 2331),
        Progress("Exporting model", 597, 597),
        Progress("Exporting model", 120, 597),
    ]
    assert [event.level for event in events if isinstance(event, Notice)] == ["info", "warning", "info", "error"]
    assert not any("%|" in line for line in output.lines)
    assert (tmp_path / "log").read_bytes() == REAL.encode()


@given(st.lists(st.integers(1, 60), max_size=40))
def test_pieces_do_not_matter(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    folder, data = tmp_path_factory.getbasetemp(), REAL.encode()
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    assert feed(folder, *pieces, data[at:])[1] == feed(folder, data)[1]


@given(st.binary(max_size=3000))
def test_any_bytes_are_taken(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    feed(tmp_path_factory.getbasetemp(), data)


def test_gbk_is_read(tmp_path: Path) -> None:
    output, _ = feed(tmp_path, "错误：目标平台不支持该量化类型\n".encode("gbk"))
    assert output.lines[0] == "错误：目标平台不支持该量化类型"


def test_a_bar_that_is_not_over_ends_the_tail(tmp_path: Path) -> None:
    output, _ = feed(tmp_path, b"INFO: x\nOptimizing model:  88%|##| 28/32 [1:04:19<09:28, 142.23s/it]")
    assert output.tail() == ["INFO: x", "Optimizing model:  88%|##| 28/32 [1:04:19<09:28, 142.23s/it]"]


def test_a_line_without_an_end_does_not_grow(tmp_path: Path) -> None:
    output, _ = feed(tmp_path, *[b"x" * 10_000] * 30)
    assert len(output._pending) < 70_000
    assert len("".join(output.lines)) <= 300_000


def test_what_the_toolkit_says_that_it_sets(tmp_path: Path) -> None:
    # From https://github.com/airockchip/rknn-llm/issues/220 and the like.
    text = """INFO: Setting token_id of bos to 151646
INFO: Setting token_id of eos to 151643
INFO: Setting add_bos_token to True
INFO: Setting add_eos_token to False
INFO: Setting max_context_limit to 4096
INFO: Setting out to work
"""
    assert feed(tmp_path, text.encode())[0].settings == {
        "token_id of bos": "151646",
        "token_id of eos": "151643",
        "add_bos_token": "True",
        "add_eos_token": "False",
        "max_context_limit": "4096",
    }
    many = "".join(f"INFO: Setting token_id of t{number} to {number}\n" for number in range(10_000))
    assert len(feed(tmp_path, many.encode())[0].settings) <= 100
