"""The self-test's report: for a person to read, and as a file to send, without this machine's paths."""

from __future__ import annotations

import json
import platform as host
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any, Final

from rkconvert.output.bundle_folder import created_by
from rkconvert.output.host_memory import read_memory
from rkconvert.output.paths import without_paths
from rkconvert.selftest.answers import answers
from rkconvert.selftest.run import FAILED, NOT_RUN, PASSED, CaseResult
from rkconvert.toolkit.interpreter import Toolkit
from rkruntime.errors import ToolkitError
from rkruntime.files import atomic_file, write_error
from rkruntime.folders import own_folder

_WIDTH: Final = 100
_INDENT: Final = " " * 9


def default_file() -> Path:
    """Return a path beside the toolkit's logs. Raises HostError or OutputError if the folder cannot be made."""
    folder = own_folder("cache") / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    return folder / time.strftime("toolkit-selftest-%Y%m%d-%H%M%S.json")


@dataclass
class Report:
    """The outcomes so far.

    Attributes:
        complete: Whether all cases were carried out or skipped for a reason; False after Ctrl-C or a kill.
    """

    toolkit: Toolkit
    platform: str
    outcomes: list[CaseResult] = field(default_factory=list)
    complete: bool = False

    @property
    def passed(self) -> bool:
        """Whether everything that the release promises works."""
        return self.complete and all(outcome.status == PASSED for outcome in self._promised)

    @property
    def exit_code(self) -> int:
        """The first failure's exit code; 0 if all passed."""
        failed = next((outcome.exit_code for outcome in self._promised if outcome.exit_code), ToolkitError.exit_code)
        return 0 if self.passed else failed

    @property
    def _promised(self) -> list[CaseResult]:
        return [outcome for outcome in self.outcomes if not outcome.case.asks]

    @property
    def head(self) -> str:
        """A line that says what was tested."""
        parts = ", ".join(f"{name} {version}" for name, version in self.toolkit.parts.items() if version)
        return (
            f"rkllm-toolkit {self.toolkit.version} for {self.platform}, Python {self.toolkit.python_version}"
            f"{parts and f' ({parts})'}"
        )

    @property
    def summary(self) -> str:
        """The last line: how many cases passed, failed and were not run."""
        many = {status: sum(item.status == status for item in self.outcomes) for status in (PASSED, FAILED, NOT_RUN)}
        rest = ", ".join(f"{count} {status}" for status, count in many.items() if count and status != PASSED)
        return f"{many[PASSED]} of {len(self._promised)} passed{rest and f', {rest}'}"

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report as JSON types, without paths of this machine."""
        document = {
            "created_by": created_by(),
            "host": {"system": host.platform(), "memory": str(read_memory())},
            "toolkit": self.toolkit.as_dict(),
            "platform": self.platform,
            "complete": self.complete,
            "passed": self.passed,
            "summary": self.summary,
            "answers": answers(self.outcomes) if self.complete else {},
            "cases": [outcome.as_dict() for outcome in self.outcomes],
        }
        public: dict[str, Any] = without_paths(document, [self.toolkit.python.parent.parent])
        return public

    def save(self, path: Path) -> None:
        """Write the report as far as it goes. Raises OutputError or HostError."""
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def closing(self) -> Iterator[str]:
        """Yield the lines below the cases: doubts about the files, answers, and the summary."""
        doubts = dict.fromkeys(text for outcome in self.outcomes for text in outcome.made.get("doubts", ()))
        yield from (f"note: {text}" for text in doubts)
        yield ""
        for question, answer in answers(self.outcomes).items():
            first, *more = wrap(f"{question:36} {answer}", _WIDTH, subsequent_indent=" " * 37)
            yield from (first, *more)
        yield ""
        yield self.summary


def lines(outcome: CaseResult) -> Iterator[str]:
    """Yield a case in one line, and below it why it failed."""
    size = f"{outcome.made['file']['size'] / 1e6:6.1f} MB" if outcome.worked else ""
    seconds = "" if outcome.status == NOT_RUN else f"{outcome.seconds:6.1f} s"
    yield f"{outcome.status:8} {outcome.case.name:45} {seconds} {size}".rstrip()
    for key in ("message", "hint"):
        text = str(outcome.error.get(key, ""))
        yield from wrap(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, break_long_words=False)
