"""A kernel in the place of the one behind a file tree: it follows what is written there, as cpufreq and devfreq do.

Files, governors and clocks are those that a board with the vendor's kernel showed
(https://github.com/antonioacg/rknpu-rk3588/blob/main/docs/porting-journal.md, "Devfreq"), the others those of the
vendor's script (https://github.com/airockchip/rknn-llm/blob/release-v1.2.3/scripts/fix_freq_rk3588.sh).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.doctor.sysroots import DEVFREQ_GOVERNORS, GOOD, GOVERNORS, clocks, plant

CPU = "sys/devices/system/cpu/cpufreq/policy"
NPU, DMC = "sys/class/devfreq/fdab0000.npu", "sys/class/devfreq/dmc"
NPU_CLOCKS = " ".join(f"{mhz}000000" for mhz in (300, 400, 500, 600, 700, 800, 900, 1000))
DDR_CLOCKS = "534000000 1320000000 1968000000 2112000000"


def policy(first: int, best: int) -> dict[str, str]:
    values = {
        "scaling_governor": "ondemand", "scaling_available_governors": GOVERNORS, "scaling_cur_freq": 408000,
        "scaling_min_freq": 408000, "scaling_max_freq": best, "cpuinfo_max_freq": best,
        "scaling_setspeed": "<unsupported>", "scaling_available_frequencies": f"408000 600000 1200000 1800000 {best} ",
    }  # fmt: skip
    return {f"{CPU}{first}/{name}": f"{value}\n" for name, value in values.items()}


# An idle board: nothing is as fast as it could be.
IDLE: dict[str, Any] = {
    **GOOD,
    **policy(0, 1800000),
    **policy(4, 2256000),
    **policy(6, 2304000),
    **clocks("fdab0000.npu", "rknpu_ondemand", 300000000, 1000000000, NPU_CLOCKS, DEVFREQ_GOVERNORS),
    f"{NPU}/userspace/set_freq": "undefined\n",
    **clocks("dmc", "dmc_ondemand", 534000000, 2112000000, DDR_CLOCKS, DEVFREQ_GOVERNORS),
    f"{DMC}/userspace/set_freq": "undefined\n",
}
FOLDERS = {f"{CPU}0": 408000, f"{CPU}4": 408000, f"{CPU}6": 408000, NPU: 300000000, DMC: 534000000}
BEST = {f"{CPU}0": 1800000, f"{CPU}4": 2256000, f"{CPU}6": 2304000, NPU: 1000000000, DMC: 2112000000}
FASTEST = {"cpu0": "1800 MHz", "cpu4": "2256 MHz", "cpu6": "2304 MHz", "npu": "1000 MHz", "ddr": "2112 MHz"}


class Chip:
    """Follows the files of a tree until it is left.

    Args:
        clip: What becomes of a value that is set, by the clock's folder.
        stubborn: Folders whose governor goes back to what it was.
        without: Folders that it does not follow.
    """

    def __init__(
        self,
        root: Path,
        clip: Mapping[str, Callable[[int], int]] | None = None,
        stubborn: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
    ) -> None:
        self.root, self._clip, self._stubborn = root, dict(clip or {}), stubborn
        self.folders = [folder for folder in FOLDERS if folder not in without]
        self.governors = {folder: self.governor(folder) for folder in self.folders}
        self.seen: list[tuple[str, str]] = []
        self._ended = False
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def names(self, folder: str) -> tuple[Path, Path, Path]:
        start, end = ("scaling_", "scaling_setspeed") if folder.startswith(CPU) else ("", "userspace/set_freq")
        place = self.root / folder
        return place / f"{start}governor", place / end, place / f"{start}cur_freq"

    def governor(self, folder: str) -> str:
        return self.names(folder)[0].read_text(errors="replace").strip()

    def now(self, folder: str) -> int:
        return int(self.names(folder)[2].read_text())

    @property
    def state(self) -> dict[str, tuple[str, int]]:
        return {folder: (self.governor(folder), self.now(folder)) for folder in FOLDERS}

    def _follow(self) -> None:
        while not self._ended:
            for folder in self.folders:
                with suppress(OSError, ValueError):
                    self._step(folder)
            time.sleep(0.002)

    def _step(self, folder: str) -> None:
        governor, value, now = self.names(folder)
        found = governor.read_bytes()
        if not found:  # between two system calls of whoever writes
            return
        # What the handlers of the NPU's driver do to the last byte.
        name = found[:-1].decode()
        if name != self.governors[folder]:
            if folder in self._stubborn:
                governor.write_text(f"{self.governors[folder]}\n")
                return
            self.governors[folder] = name
            self.seen.append((folder, name))
        if name == "userspace":
            written = value.read_bytes()
            wanted = int(written[:-1]) if written[:-1].isdigit() else self.now(folder)
        elif name == "performance":
            wanted = BEST[folder]
        else:
            wanted = self.now(folder) if name == "rknpu_ondemand" else FOLDERS[folder]
        wanted = self._clip.get(folder, int)(wanted)
        if wanted != self.now(folder):
            new = now.with_name("new")
            new.write_text(f"{wanted}\n")
            new.replace(now)

    def __enter__(self) -> Chip:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()


@contextmanager
def running(root: Path, files: Mapping[str, Any] | None = None, **behaviour: Any) -> Iterator[Chip]:
    """An idle board with other files, and its kernel."""
    plant(root, IDLE | dict(files or {}))
    with Chip(root, **behaviour) as chip:
        yield chip


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
