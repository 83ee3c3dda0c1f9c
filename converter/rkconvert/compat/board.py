"""Try a bundle on a board over ssh: copy it, let the board's own rkedge load and ask it, and remove it.

Each step's result is recorded as it arrives: a visit that is cut off, at either end or on the way, can be resumed.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from rkconvert.compat.journal import Journal
from rkconvert.compat.results import EMULATOR, release_of
from rkruntime.bundle.manifest import MANIFEST, Bundle, bundles_in, is_bundle, open_bundle
from rkruntime.errors import ServiceError
from rkruntime.evidence import MOST_CONTEXT, MOST_RAM_GIB
from rkruntime.printable import one_line
from rkruntime.probes import LOST
from rkruntime.remote import Remote, ssh_command
from rkruntime.schema import build
from rkruntime.visit import MARK, PROTOCOL
from rkruntime.visit.steps import LOAD, STEPS

# Limit on what a board may send in one connection.
_MOST_BYTES: Final = 16 << 20
_BLOCK: Final = 1 << 20
_HEARTBEAT_S: Final = 5.0
# Seconds of silence after which a connection counts as lost: a board answers each heartbeat.
_SILENCE_S: Final = 60.0
# Facts in the result of a load: if one of them changes, earlier results are about another board.
_SAME_BOARD: Final = ("library", "driver", "driver_seen", "kernel", "board", "context")
# Limit on one operation in seconds: it may read gigabytes from a slow card.
_PATIENCE_S: Final = 1800.0
# Pauses in seconds before connecting again: a restarted board is back in a minute or two, or after a file system check.
_WAITS_S: Final = (0.2, 1, 2, 5, 10, 20, 30, 60, 60, 60, 60, 60, 120, 120)
_MOST_REBOOTS: Final = 2
_MOST_BREAKS: Final = 8
_MOST_COPIES: Final = 3
# Runs of all steps in one connection; one is enough, unless something has changed on the board.
_MOST_TRIES: Final = 4
_INSTALL: Final = "docs/serve.md says how to install it; name it with --remote-command if it is elsewhere"
# Exit statuses of rsync that are about the connection: rsync(1), EXIT VALUES.
_RSYNC_BROKEN: Final = (10, 12, 30, 35, 255)


class _BrokenError(Exception):
    """The connection, or the process at its other end, is gone."""

    def __init__(self, told: str) -> None:
        super().__init__(told)
        self.told = told


@dataclass(frozen=True)
class Opened:
    """A board's answer to `open`: its release, and the state of the visit's folder."""

    event: str
    protocol: int
    rkedge: str
    folder: str
    sizes: dict[str, int]
    rsync: bool
    free: int
    boot: str


@dataclass
class Visit:
    """A bundle to be tried on a board.

    Attributes:
        destination: Address for ssh, such as `user@board`.
        program: Command that starts rkedge on the board, in words.
        steps: Steps to do, a part of STEPS.
        options: Further words for `rkedge visit try`.
        say: Called with lines about progress.
        reached: Whether the board has answered.
    """

    destination: str
    bundle: Bundle
    program: Sequence[str]
    steps: Sequence[str]
    options: Sequence[str]
    say: Callable[[str], None]
    reached: bool = False

    def results(self) -> Journal:
        """Do all steps, then return a journal with every result; nothing is left on the board.

        Raises:
            BundleError: The bundle is not what its manifest says.
            ServiceError: The board cannot be reached, lacks something, or refuses. A new start resumes the visit.
        """
        self.bundle.verify()
        with Journal.held(self.destination, self.bundle, *self.options) as journal:
            journal.results = {step: kept for step, kept in journal.results.items() if _is_sound(step, kept)}
            journal.save()
            self._complete(journal)
        return journal

    def _complete(self, journal: Journal) -> None:
        waits, done = iter(_WAITS_S), -1
        while not (journal.removed and not self._left(journal)):
            if len(journal.results) > done:  # the last connection made progress
                waits, done = iter(_WAITS_S), len(journal.results)
            try:
                self._session(journal)
            except _BrokenError as error:
                wait = next(waits, None)
                if not self.reached:
                    raise ServiceError(
                        f"{self.destination} cannot be reached: {error.told}",
                        hint=f"Try it by hand: ssh {self.destination} true",
                    ) from None
                if wait is None:
                    raise ServiceError(
                        f"{self.destination} is lost: {error.told}",
                        hint="Start the same command again: it continues where it stopped, and cleans up.",
                    ) from None
                self.say(f"{error.told} Trying again in {wait:g} s.")
                time.sleep(wait)
            except ServiceError:
                # Something is missing or wrong there: clean up, as nobody knows when and with what this starts again.
                with suppress(ServiceError, _BrokenError):
                    self._call(journal, "remove")
                journal.begun = ""  # the connection was not lost during this step
                journal.save()
                raise

    def _left(self, journal: Journal) -> list[str]:
        """Return the steps that are still to be done."""
        if not journal.results.get(LOAD, {"loads": True})["loads"]:
            return []
        return [step for step in (LOAD, *self.steps) if step not in journal.results]

    def _session(self, journal: Journal) -> None:
        if self._left(journal):
            journal.removed = False
            opened = self._open(journal)
            self._copy(journal, opened)
            for _ in range(_MOST_TRIES):
                if not (left := self._left(journal)):
                    break
                self._try(journal, left)
            else:
                raise _nonsense("it ends without having done what is asked")
        self._call(journal, "remove")
        journal.removed = True
        journal.save()

    def _open(self, journal: Journal) -> Opened:
        found = build(Opened, self._call(journal, "open"), _nonsense)
        self.reached = True
        if found.protocol != PROTOCOL:
            raise ServiceError(
                f"{self.destination} has rkedge {one_line(found.rkedge)[:40]}, which does this in another way.",
                hint="Install the same release there as here.",
            )
        if journal.begun:
            count = journal.reboots if found.boot != journal.boot else journal.breaks
            count[journal.begun] = count.get(journal.begun, 0) + 1
            self._give_up(journal)
        journal.boot = found.boot
        journal.save()
        return found

    def _give_up(self, journal: Journal) -> None:
        """Record a step as failed if the board or the connection was lost in it too often."""
        step, reboots = journal.begun, journal.reboots.get(journal.begun, 0)
        journal.begun = ""
        if reboots >= _MOST_REBOOTS:
            says = f"The board restarted each time, {reboots} times."
        elif journal.breaks.get(step, 0) >= _MOST_BREAKS:
            says = f"The connection or the process there was lost each time, {journal.breaks[step]} times."
            if step == LOAD:
                journal.breaks.clear()
                journal.save()
                raise ServiceError(
                    f"{self.destination}: {says}",
                    hint="Load it there by hand: rkedge run BUNDLE --selftest; dmesg | rkedge diagnose",
                )
        else:
            return
        if step == LOAD and journal.results.get(LOAD, {"loads": False})["loads"]:
            journal.reboots.clear()
            journal.save()
            raise self._loaded_before(says)
        lost = {"loads": False, "log": []} if step == LOAD else {"result": LOST}
        journal.results[step] = {**lost, "says": says}

    # Copying

    def _copy(self, journal: Journal, opened: Opened) -> None:
        """Copy all files to the board, and compare their hashes there."""
        files = {MANIFEST: (self.bundle.path / MANIFEST).stat().st_size}
        files |= {name: record.size for name, record in self.bundle.manifest.files.items()}
        there = opened.sizes
        for _ in range(_MOST_COPIES):
            missing = {name: size for name, size in files.items() if there.get(name) != size}
            need = sum(size - min(size, there.get(name, 0)) for name, size in missing.items())
            if need > opened.free:
                raise ServiceError(
                    f"{self.destination} has {opened.free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB to copy.",
                    hint="Free space there, or let XDG_CACHE_HOME name a folder on another disk.",
                )
            if missing:
                self.say(f"copying {need / 1e9:.2f} GB")
            if not (opened.rsync and self._rsynced(opened.folder, missing)):
                for name, size in missing.items():
                    self._send(journal, name, there.get(name, 0) if there.get(name, 0) < size else 0)
            wrong = self._call(journal, "check")["wrong"]
            if not wrong:
                return
            there = {name: size for name, size in files.items() if name not in wrong}
        raise ServiceError(
            f"{', '.join(map(one_line, wrong[:3]))} arrive damaged on {self.destination}.",
            hint="Check its disk and memory: rkedge doctor, dmesg.",
        )

    def _rsynced(self, folder: str, names: Mapping[str, int]) -> bool:
        """Whether rsync copied the files. It is not tried with an address that it would read differently from ssh."""
        plain = not set(self.destination) & set(":/[] ") and folder.startswith("/") and folder.isprintable()
        if not names or not plain:
            return not names
        shell = shlex.join(ssh_command(self.destination)[:-2])
        command = ["rsync", "-rtL", "-s", "--inplace", "--append", "--from0", "--files-from=-", "-e", shell]
        target = f"{self.destination}:{folder}/"
        try:
            done = subprocess.run(
                [*command, "--", f"{self.bundle.path.resolve()}/", target],
                input="\0".join(names).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except OSError:  # rsync is not installed here
            return False
        if done.returncode in _RSYNC_BROKEN:
            raise _BrokenError(f"rsync lost the connection to {self.destination}.")
        return done.returncode == 0

    def _send(self, journal: Journal, name: str, offset: int) -> None:
        with (self.bundle.path / name).open("rb") as file:
            file.seek(offset)
            self._call(journal, "receive", name, str(offset), stream=file)

    # Talking

    def _remote(self, journal: Journal, operation: str, *words: str) -> Remote:
        words = (*self.program, "visit", operation, journal.id, *words)
        return Remote(ssh_command(self.destination, *map(shlex.quote, words)), MARK, _MOST_BYTES)

    def _call(
        self, journal: Journal, operation: str, *words: str, stream: IO[bytes] | None = None
    ) -> Mapping[str, Any]:
        """Run an operation whose answer is one event, and return that event."""
        remote = self._remote(journal, operation, *words)
        event = None
        try:
            while stream and (block := stream.read(_BLOCK)) and remote.send(block):
                pass
            remote.sent()
            line = remote.line(_PATIENCE_S)
            event = _event(line) if line else None
        finally:
            status = remote.end(_HEARTBEAT_S if event else 0.2)
        if event is None or event["event"] == "error":
            raise self._ended(event, status, remote)
        return event

    def _try(self, journal: Journal, left: Sequence[str]) -> None:
        words = [word for step in left for word in ("--step", step)]
        remote = self._remote(journal, "try", *words, *self.options)
        event: Mapping[str, Any] | None = None
        try:
            for event in self._events(remote):
                self._note(journal, event)
        finally:
            status = remote.end(_HEARTBEAT_S)
        if event is None or event["event"] != "end":
            raise self._ended(event, status, remote)

    def _events(self, remote: Remote) -> Iterator[Mapping[str, Any]]:
        heard = time.monotonic()
        while not remote.over and time.monotonic() - heard < _SILENCE_S:
            remote.send(b"\n")
            while line := remote.line(_HEARTBEAT_S):
                heard = time.monotonic()
                event = _event(line)
                if event["event"] == "alive":
                    break
                yield event
                if event["event"] in ("end", "error"):
                    return

    def _note(self, journal: Journal, event: Mapping[str, Any]) -> None:
        step = event.get("step")
        if event["event"] == "begin" and step in STEPS:
            journal.begun = str(step)
            self.say(f"{step} ...")
        elif event["event"] == "done" and step in STEPS:
            journal.begun = ""
            result = _checked(str(step), event.get("result"))
            if step == LOAD:
                self._check_soc(result)
                self._compare(journal, result)
            journal.results[str(step)] = result
            self.say(f"{step}: {one_line(str(journal.results[str(step)]['says']))}")
        journal.save()

    def _check_soc(self, load: Mapping[str, Any]) -> None:
        """Raise ServiceError if the bundle was made for another SoC: the result would say nothing about it."""
        made, soc = self.bundle.manifest, load.get("soc")
        if soc and soc != made.platform and not is_emulated(load, self.bundle):
            raise ServiceError(
                f"{self.destination} is an {soc.upper()}, and {made.name} was made for {made.platform.upper()}.",
                hint=f"Convert it with --platform {soc}, or name another board.",
            )

    def _compare(self, journal: Journal, load: Mapping[str, Any]) -> None:
        """Compare a load with that of an earlier connection. Raises ServiceError if only the earlier one succeeded."""
        earlier = journal.results.get(LOAD)
        if earlier is None:
            return
        if earlier["loads"] and not load["loads"]:
            raise self._loaded_before(load["says"], load.get("log", ()))
        if any(earlier.get(name) != load.get(name) for name in _SAME_BOARD):
            journal.results.clear()  # what was found out is about another library, driver or kernel

    def _loaded_before(self, says: str, lines: Sequence[str] = ()) -> ServiceError:
        return ServiceError(
            f"{self.destination} has loaded it before, and now: {one_line(says)}",
            hint="Does something else use the NPU? rkedge doctor; then start the same command again.",
            details={"lines": list(lines)},
        )

    def _ended(self, event: Mapping[str, Any] | None, status: int | None, remote: Remote) -> Exception:
        """Return why an operation gave no answer: _BrokenError if it is worth connecting again, else ServiceError."""
        details = {"lines": remote.notes, "exit": status}
        if event and event["event"] == "error":
            message, hint = (one_line(str(event.get(key, "")))[:2000] for key in ("message", "hint"))
            return ServiceError(f"{self.destination} says: {message}", hint=hint)
        if status == 127:
            return ServiceError(
                f"{self.destination} has no {self.program[0]}: RKEdge is not installed there, or not on the PATH that"
                " ssh gives it.",
                hint=f"{_INSTALL}, such as /opt/rkedge/bin/rkedge.",
                details=details,
            )
        if status == 2:
            return ServiceError(
                f"The rkedge of {self.destination} does not know `visit`.",
                hint="Install the same release there as here.",
                details=details,
            )
        if remote.flooded:
            return ServiceError(f"{self.destination} sent megabytes of something other than answers.", details=details)
        said = " ".join(line for line in remote.notes if line.strip())[-300:]
        if status in (255, 130, None) or event is not None:
            return _BrokenError(f"The connection to {self.destination} broke. {said}".strip())
        return _BrokenError(f"rkedge ended with {status} on {self.destination}. {said}".strip())


def _nonsense(what: str) -> ServiceError:
    hint = "Compare `rkedge --version` here and there; something else may be answering instead."
    return ServiceError(f"The board sent something that is not an answer: {what}.", hint=hint)


def _event(line: bytes) -> dict[str, Any]:
    """Parse a line as an event. Raises ServiceError if it is not one, _BrokenError if it was cut off."""
    if not line.endswith(b"\n"):
        raise _BrokenError("An answer was cut off.")
    try:
        event = json.loads(line.removeprefix(MARK))
        json.dumps(event, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise _nonsense("it is not JSON") from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise _nonsense("it has no name")
    return event


_Check = Callable[[Any], bool]
_COUNT: Final[_Check] = lambda value: type(value) is int and 0 <= value <= MOST_CONTEXT  # noqa: E731
_FIGURE: Final[_Check] = lambda value: type(value) in (int, float) and 0 <= value <= 1e12  # noqa: E731
_TEXT: Final[_Check] = lambda value: isinstance(value, str) and len(value) <= 500  # noqa: E731
_NAME: Final[_Check] = lambda value: isinstance(value, str) and len(value) <= 200  # noqa: E731
_FLAG: Final[_Check] = lambda value: isinstance(value, bool)  # noqa: E731
# Fields that a step's result may have, each with its check: they go into the result file.
_FIELDS: Final[Mapping[str, _Check]] = {
    "says": _TEXT,
    "result": _NAME,
    "loads": _FLAG,
    "right": _FLAG,
    "emulated": _FLAG,
    "log": lambda value: isinstance(value, list) and len(value) <= 40 and all(map(_TEXT, value)),
    "clocks": lambda value: isinstance(value, dict) and len(value) <= 100 and all(map(_NAME, value))
    and all(type(item) is int and 0 <= item < 1 << 40 for item in value.values()),
    **dict.fromkeys(("board", "soc", "kernel", "driver", "driver_seen"), _NAME),
    **dict.fromkeys(("tokens_per_s", "first_token_ms", "memory_mb"), _FIGURE),
    "context": _COUNT,
    "library": lambda value: _NAME(value) and (not value or release_of(value) is not None),
    "ram_gib": lambda value: _FIGURE(value) and value <= MOST_RAM_GIB,
}  # fmt: skip


def _checked(step: str, result: Any) -> dict[str, Any]:
    """Return a step's result. Raises ServiceError if it lacks a field, or has an unknown or invalid one."""
    if not isinstance(result, dict) or not {"says", "loads" if step == LOAD else "result"} <= result.keys():
        raise _nonsense(f"the result of {step} lacks a field")
    if bad := [key for key, value in result.items() if key not in _FIELDS or not _FIELDS[key](value)]:
        raise _nonsense(f"the result of {step} has an invalid {one_line(str(bad[0]))[:40]!r}")
    return result


def _is_sound(step: str, kept: Any) -> bool:
    """Whether a kept result, which an earlier release may have written, is valid in this one."""
    try:
        return bool(_checked(step, kept))
    except ServiceError:
        return False


def is_emulated(load: Mapping[str, Any], bundle: Bundle) -> bool:
    """Whether the emulator was loaded, so that no figure is a board's."""
    return bool(load.get("emulated")) or bundle.manifest.target == EMULATOR


def bundles_of(path: Path) -> list[Bundle]:
    """Return the bundle in a folder, or those in its subfolders; may be empty. Raises BundleError for a broken one."""
    if not path.is_dir():
        return []
    return [open_bundle(found) for found in ([path] if is_bundle(path) else bundles_in(path))]
