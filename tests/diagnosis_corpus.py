"""The collected logs, and the messages that programs can print, for the tests and the benchmark of the diagnosis."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "data"

# Cases of the first collection whose log holds no line on the cause: bare crashes, versions and healthy lines.
SILENT = {
    "rknn-llm-99", "rknn-llm-277", "rknn-llm-278", "rknn-llm-284", "rknn-toolkit2-287", "rknn-toolkit2-447",
    "rknn-toolkit2-506", "rkllama-22", "rkllama-86", "file-69457407247b",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A log and what its thread says it was.

    Attributes:
        origin: the repository of the thread; of a file, the file.
        holds: whether the log itself has a line on the cause.
    """

    id: str
    class_: str
    origin: str
    holds: bool
    log: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """A message of a program's source, its gaps filled; `why` says why it has no class."""

    source: str
    class_: str | None
    why: str | None
    text: str
    line: str


def cases(*names: str) -> list[Case]:
    """The cases of files in tests/data that have a log."""
    rows = [json.loads(line) for name in names for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return [
        Case(row["id"], row["class"], _origin(row), row.get("holds", row["id"] not in SILENT), tuple(row["log"]))
        for row in rows
        if row["log"]
    ]


def known() -> list[Case]:
    """The cases that the rules were written from; without texts taken from a program, which messages.yaml has."""
    return [case for case in cases("failures", "more_failures") if not re.match(r"(driver-)?text-", case.id)]


def everything() -> list[Case]:
    """The known cases and those that once measured; whoever writes a rule today has read them all."""
    return known() + cases("unseen_failures", "fresh_failures", "later_failures", "recent_failures")


def other_logs() -> list[dict[str, Any]]:
    """Logs without a failure that has a class.

    `foreign`: of other programs; `healthy`: of RKNN and RKLLM when all is well; `other`: of RKNN, with a trouble that
    is outside of the taxonomy, or with lines that look worse than they are.
    """
    return [json.loads(line) for line in (DATA / "other_logs.jsonl").read_text("utf-8").splitlines()]


def messages() -> Iterator[Message]:
    """Every message of messages.yaml as a line of a log."""
    data = yaml.safe_load((DATA / "messages.yaml").read_text("utf-8"))
    for entry in data["messages"]:
        prefix = data["sources"][entry["source"]]["prefix"]
        for text in entry["texts"]:
            yield Message(entry["source"], entry.get("class"), entry.get("none"), text, prefix + _filled(text))


def _origin(row: dict[str, Any]) -> str:
    """The repository, or the file whose address is not known (`file-N`; a letter tells cases of one file apart)."""
    match = re.match(r"https://github\.com/([^/]+/[^/]+)/", row["source"])
    return match[1] if match else str(row["id"]).rstrip("abc")


def _filled(text: str) -> str:
    """A printf format with values in it."""
    text = re.sub(r"%(?:pa[d]?|p|#?[-0-9.]*[lzh]*x)", "0x1f", text)
    text = re.sub(r"%[-+ 0-9.]*[lzh]*[diuf]", "7", text)
    return re.sub(r"%[-0-9]*s", "name", text)
