"""Set a clock, read it back, and later restore it.

Each value is one write that ends in a line feed: handlers of the NPU's driver overwrite the last byte of what they are
given (rknpu_debugger.c of 0.9.8), so that `1000000000` alone would become 100000000.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

from rkboard.clocks.wishes import GOVERNOR, Goal
from rkboard.doctor.probe import Tree
from rkboard.doctor.readings import CPUFREQ, DEVFREQ, STAYING, mhz
from rkruntime.errors import HostError
from rkruntime.schema import Between, Length

_MOST_BYTES: Final = 4096
# Time for the kernel to carry out a write after it has returned.
_SETTLE_S: Final = 1.0
_STEP_S: Final = 0.02
_FOLDER: Final = re.compile(rf"{CPUFREQ}/policy\d{{1,3}}|{DEVFREQ}/(?:dmc|[0-9a-f]{{6,10}}\.npu)", re.ASCII)
_WORD: Final = re.compile(r"[A-Za-z0-9_]{1,32}", re.ASCII)


class _Names(NamedTuple):
    """Names of a clock's files, and their unit in Hz."""

    governor: str
    set: str
    now: str
    unit: int


_CPU: Final = _Names("scaling_governor", "scaling_setspeed", "scaling_cur_freq", 1000)
_DEVICE: Final = _Names("governor", "userspace/set_freq", "cur_freq", 1)


@dataclass(frozen=True)
class Saved:
    """A clock as it was before. `before`: its value in Hz, 0 if unknown; `set`: the value it is held at, in Hz.

    Raises:
        ValueError: It does not name a clock.
    """

    name: Annotated[str, Length(32)]
    folder: Annotated[str, Length(200)]
    governor: Annotated[str, Length(32)]
    before: Annotated[int, Between(0, 1 << 40)]
    set: Annotated[int, Between(0, 1 << 40)]

    def __post_init__(self) -> None:
        if not (_FOLDER.fullmatch(self.folder) and _WORD.fullmatch(self.governor) and _WORD.fullmatch(self.name)):
            raise ValueError("a saved clock is not a clock")

    @classmethod
    def of(cls, goal: Goal) -> Saved:
        """Make it from a clock that is about to be set."""
        clock = goal.clock
        return cls(clock.name, clock.folder, clock.governor or "", goal.before or 0, goal.hertz)

    @property
    def names(self) -> _Names:
        """The names of its files."""
        return _CPU if self.folder.startswith(CPUFREQ) else _DEVICE


class Setter:
    """Reads and writes the files of clocks below `root`; symbolic links are followed within it."""

    def __init__(self, root: str) -> None:
        self._tree = Tree(root)

    def hold(self, saved: Saved) -> None:
        """Set a clock. Raises HostError if the kernel refuses the value or sets another."""
        names, folder = saved.names, saved.folder
        self._write(f"{folder}/{names.governor}", GOVERNOR)
        self._expect(saved, f"{folder}/{names.governor}", GOVERNOR)
        value = str(saved.set // names.unit)
        self._write(f"{folder}/{names.set}", value)
        self._expect(saved, f"{folder}/{names.now}", value)

    def differs(self, saved: Saved) -> str:
        """Return how a held clock differs from what was set; empty if it does not."""
        try:
            governor = self._read(f"{saved.folder}/{saved.names.governor}")
            now = self._read(f"{saved.folder}/{saved.names.now}")
        except OSError as error:
            return f"{saved.name} can no longer be read: {error.strerror}"
        if governor != GOVERNOR:
            return f"{saved.name} has the governor {governor}"
        if now != str(saved.set // saved.names.unit):
            shown = mhz(int(now) * saved.names.unit) if re.fullmatch(r"\d{1,12}", now, re.ASCII) else "something else"
            return f"{saved.name} was set to {mhz(saved.set)} and is at {shown}"
        return ""

    def restore(self, saved: Saved) -> str:
        """Put a clock back; return a note if it was left as it is because somebody else has set its governor meanwhile.

        Where the former governor keeps whatever clock it finds, the value is put back first.

        Raises:
            HostError: The kernel does not take it.
        """
        names, folder = saved.names, saved.folder
        path = f"{folder}/{names.governor}"
        try:
            governor = self._read(path)
        except OSError as error:
            raise HostError(f"/{path} can no longer be read: {error.strerror}.") from error
        if governor == saved.governor != GOVERNOR:
            return ""
        if governor != GOVERNOR:
            return f"{saved.name} has the governor {governor} from somebody else, and keeps it"
        refused = self._put_value_back(saved) if saved.before and saved.governor in STAYING else None
        self._write(path, saved.governor)
        self._expect(saved, path, saved.governor)
        if refused is not None:
            raise refused
        return ""

    def _put_value_back(self, saved: Saved) -> HostError | None:
        """Put the value back; return an error instead of raising it, as restoring the governor matters more."""
        value = str(saved.before // saved.names.unit)
        try:
            self._write(f"{saved.folder}/{saved.names.set}", value)
            self._expect(saved, f"{saved.folder}/{saved.names.now}", value)
        except HostError as error:
            return error
        return None

    def _read(self, path: str) -> str:
        return self._tree.read(path, _MOST_BYTES)[0].decode("utf-8", "replace").strip()

    def _write(self, path: str, value: str) -> None:
        """Write a value and a line feed. Raises HostError."""
        flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        data = f"{value}\n".encode()
        try:
            place = self._tree.place(path)
            if not stat.S_ISREG(os.lstat(place).st_mode):
                raise OSError(0, "it is not a regular file")
            handle = os.open(place, flags)
            try:
                if os.write(handle, data) != len(data):
                    raise OSError(0, "it accepted only part of it")
            finally:
                os.close(handle)
        except OSError as error:
            raise HostError(
                f"The kernel does not take {value} in /{path}: {error.strerror}.",
                hint="`rkedge doctor` says more about this board's clocks.",
            ) from error

    def _expect(self, saved: Saved, path: str, wanted: str) -> None:
        """Raise HostError unless the file has this value, at once or soon."""
        found = ""

        def says() -> bool:
            nonlocal found
            try:
                found = self._read(path)
            except OSError as error:
                found = f"an error ({error.strerror})"
            return found == wanted

        if not _soon(says):
            raise HostError(
                f"The clock {saved.name} was set to {wanted}, but /{path} says {found[:40]}.",
                hint="A limit, heat or another program keeps it there. `rkedge doctor` names limits and heat.",
            )


def _soon(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + _SETTLE_S
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(_STEP_S)
    return True
