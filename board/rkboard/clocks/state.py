"""The file of what has to be restored: in /run, because a reboot resets the clocks themselves, too."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

from rkboard.clocks.setting import Saved
from rkboard.doctor.probe import Tree
from rkruntime.errors import BusyError, HostError
from rkruntime.files import atomic_file, read_regular
from rkruntime.schema import Between, Length, build

SCHEMA: Final = "rkedge-clocks-state/1"
FOLDER: Final = "run/rkedge-clocks"
_MOST_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class State:
    """The clocks that a keeper holds. `uid`: the user who asked; `pid`, `started`: the keeper, see `started`."""

    schema: Annotated[str, Length(64)]
    pid: Annotated[int, Between(1, 1 << 31)]
    started: Annotated[int, Between(0, 1 << 62)]
    uid: Annotated[int, Between(0, 1 << 32)]
    since: Annotated[float, Between(0, 1e12)]
    saved: tuple[Saved, ...] = field(default_factory=tuple)

    @property
    def alive(self) -> bool:
        """Whether the keeper still runs."""
        return started(self.pid) == self.started != 0


def started(pid: int) -> int:
    """Return when a process began, in ticks since the boot; 0 if it is gone. Process ids alone are reused."""
    with suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return 0 if words[0] in "ZX" else int(words[19])
    return 0


class StateFile:
    """The state's file, and the lock for changing clocks.

    Args:
        root: The root of the file tree.
    """

    def __init__(self, root: Path) -> None:
        self._folder = Path(Tree(str(root)).place(FOLDER))
        self.path = self._folder / "state.json"

    def read(self) -> State | None:
        """Return what is held, or what a killed keeper has left; None for nothing. Raises HostError."""
        try:
            data = json.loads(read_regular(self.path, _MOST_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise self._nonsense(str(error)) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise self._nonsense("it is from another release")
        try:
            return build(State, data, self._nonsense)
        except ValueError as error:
            raise self._nonsense(str(error)) from error

    def _nonsense(self, what: str) -> HostError:
        return HostError(
            f"{self.path}, which says how to restore the clocks, cannot be used: {what[:200]}.",
            hint=f"Reboot, or set the governors by hand and remove it: sudo rm {self.path}",
        )

    def write(self, state: State) -> None:
        """Replace the file. Raises HostError or OutputError."""
        with atomic_file(self.path) as partial:
            partial.write_text(json.dumps(asdict(state)), encoding="utf-8")
        self.path.chmod(0o644)  # everybody may read it, whatever root's umask is

    def remove(self) -> None:
        """Remove the file: nothing is held any more."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock for changing clocks while the block runs; the kernel releases it if the process dies.

        Raises:
            BusyError: Somebody else holds it.
            HostError: This user has no permission.
        """
        try:
            self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            # Not readable by others: whoever can open it can lock it.
            handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            hint = "Only root may hold clocks: docs/clocks.md describes the unit that does it for others."
            raise HostError(f"{self._folder} cannot be used: {error.strerror}.", hint=hint) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise BusyError(
                f"The clocks are already held{self._by()}.", hint="Try again when that has ended."
            ) from None
        try:
            yield
        finally:
            os.close(handle)

    def _by(self) -> str:
        with suppress(HostError):
            if state := self.read():
                return f" by process {state.pid}, for the user {state.uid}"
        return ""


def with_saved(state: State, saved: Sequence[Saved]) -> State:
    """Return the state with other clocks left to restore."""
    return replace(state, saved=tuple(saved))
