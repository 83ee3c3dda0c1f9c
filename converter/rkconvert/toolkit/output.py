"""The toolkit's output while it runs: logged raw, bars and messages turned into events, the last lines kept."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Final

from rkconvert.toolkit.events import Notice, Progress
from rkruntime.checks import logtext
from rkruntime.checks.failures import table
from rkruntime.checks.longlog import read_log
from rkruntime.folders import own_folder

_BREAK: Final = re.compile(rb"[\r\n]+")
# `Optimizing model:  88%|####4  | 28/32 [1:04:19<09:28, 142.23s/it]` (tqdm, with any block characters)
_TQDM: Final = re.compile(r"(?P<title>[^|%]{1,80}?):?\s+\d{1,3}%\|.*\|?\s(?P<done>\d{1,12})/(?P<total>\d{1,12})\s*\[")
# `[==================>] 597/597 (100%)`: the exporter's own bar, without a title.
_BAR: Final = re.compile(r"\[=*>?\s*\]\s*(?P<done>\d{1,12})/(?P<total>\d{1,12})\s*\(\d{1,3}%\)")
_EXPORT_TITLE: Final = "Exporting model"
_LEVEL: Final = re.compile(r"(?P<level>INFO|WARNING|ERROR)\s*:\s*(?P<text>\S.*)")
_VERSION: Final = re.compile(r"rkllm-toolkit version: (\S{1,40})")
# `INFO: Setting token_id of bos to 2`, and its like for add_bos_token and max_context_limit.
_SETTING: Final = re.compile(r"Setting ((?:token_id of |add_|max_)\w{1,30}) to (\S[^\r\n]{0,80})")
# A line that never ends must not grow without bound, and a log must not fill the disk.
_LONGEST_LINE: Final = 64 << 10
_MOST_LOG: Final = 32 << 20
_LAST_LINES: Final = 20
_MOST_SETTINGS: Final = 100
_LOGS_KEPT: Final = 10


def new_log() -> FileIO | None:
    """Open a new log in the user's cache, else in the temporary folder; None if neither can be written.

    The log is kept there if the conversion fails. Deletes the oldest logs, but none that a run still writes.
    """
    cache = own_folder("cache") / "logs"
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        for old in sorted(cache.glob("toolkit-*.log"))[: -_LOGS_KEPT + 1]:
            _delete_unused(old)
    for folder, prefix in ((cache, time.strftime("toolkit-%Y%m%d-%H%M%S-")), (None, "rkedge-toolkit-")):
        with suppress(OSError):
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=".log", dir=folder)
            os.close(handle)
            # Without a buffer, which would fail again when the file is closed.
            log = FileIO(name, "w")
            fcntl.flock(log, fcntl.LOCK_SH)
            return log
    return None


def _delete_unused(log: Path) -> None:
    """Delete a log and what is kept with it, unless the run that writes it has it locked."""
    with suppress(OSError), log.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in (log, qparams_of(log)):
            path.unlink(missing_ok=True)


def qparams_of(log: Path) -> Path:
    """Return where the quantization parameters of a log's run are kept, if it made any."""
    return log.with_suffix(".qparams")


class Output:
    """Collects the output as it arrives. A failure to write the log ends the log, but not the conversion.

    Args:
        log: File for the raw bytes, at most 32 MiB; closed with this. None for no log.

    Attributes:
        path: Where the log is; None if there is none.
        lost: Why the log is not whole, or empty.
        lines: Last lines that are not progress bars.
        version: Version that the toolkit reports (`INFO: rkllm-toolkit version: 1.2.3`), or empty.
        settings: What the toolkit says it sets in the file, by name (`add_bos_token`), as it writes it.
    """

    def __init__(self, log: FileIO | None) -> None:
        self.path = Path(log.name) if log else None
        self.lost = "" if log else "there was no disk to write it to"
        self._log = log
        self._room = _MOST_LOG
        self._pending = b""
        self._bar: str | None = None
        self.lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.version = ""
        self.settings: dict[str, str] = {}

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log:
            self._log.close()

    def feed(self, data: bytes) -> Iterator[Progress | Notice]:
        """Log some bytes, and yield the events of the lines that they complete."""
        self._write(data[: self._room])
        *complete, self._pending = _BREAK.split(self._pending + data)
        if len(self._pending) > _LONGEST_LINE:
            complete, self._pending = [*complete, self._pending], b""
        for line in complete:
            yield from self._line(line)

    def finish(self) -> Iterator[Progress | Notice]:
        """Yield the events of a last line without a line break."""
        line, self._pending = self._pending, b""
        yield from self._line(line)

    def tail(self) -> list[str]:
        """Return the last lines, and the bar below them."""
        return [*self.lines, self._bar] if self._bar else list(self.lines)

    @property
    def whereabouts(self) -> str:
        """Where to read the log, as a sentence."""
        if self.path is None:
            return f"There is no log: {self.lost}."
        return (
            f"Log, as far as it could be written ({self.lost}): {self.path}" if self.lost else f"Whole log: {self.path}"
        )

    def text(self) -> str:
        """Return the log so far, decoded; for a long one its head and tail, and what may matter between."""
        kept = ""
        if self.path:
            with suppress(OSError), self.path.open("rb") as file:
                kept = read_log(file, table()).text
        return kept if kept and not self.lost else "\n".join([kept, *self.tail()])

    def take(self) -> bytes:
        """Return the raw log, and delete its file. The last lines stand in for a part that could not be written."""
        kept = b""
        if self.path:
            with suppress(OSError):
                kept = self.path.read_bytes()
                self.path.unlink()
        return kept if kept and not self.lost else b"\n".join([kept, *(os.fsencode(line) for line in self.tail())])

    def _write(self, data: bytes) -> None:
        if self.lost or not self._log:
            return
        try:
            while data:
                written = self._log.write(data)
                self._room -= written
                data = data[written:]
        except OSError as error:
            self.lost = error.strerror or str(error)

    def _line(self, raw: bytes) -> Iterator[Progress | Notice]:
        for line in logtext.clean_lines(logtext.decode(raw)):
            bar = _TQDM.match(line) or _BAR.search(line)
            if bar:
                self._bar = line[:120]
                title = bar.groupdict().get("title") or _EXPORT_TITLE
                yield Progress(title.strip(), int(bar["done"]), int(bar["total"]))
                continue
            self._bar = None
            self.lines.append(line)
            if version := _VERSION.search(line):
                self.version = version[1]
            if (setting := _SETTING.search(line)) and len(self.settings) < _MOST_SETTINGS:
                self.settings[setting[1]] = setting[2].strip()
            if level := _LEVEL.search(line):
                yield Notice(level["level"].lower(), level["text"])
