"""The machine that a benchmark runs on, what else it does meanwhile, and what a command costs there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_HASHED = 1024  # blocks, a quarter of a gigabyte


@dataclass(frozen=True)
class Moment:
    """What the machine and our processes had computed at a time, in seconds."""

    clock: float
    busy: float
    stolen: float
    ours: float

    @classmethod
    def now(cls) -> Moment:
        """Ours are this process and those it waited for. The first eight columns of proc_stat(5) are user to steal."""
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in _stat_line().split()[1:9]]
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        ours = sum(one.ru_utime + one.ru_stime for one in used)
        return cls(time.monotonic(), sum(ticks) - ticks[3] - ticks[4] - ticks[7], ticks[7], ours)

    def load_until(self, end: Moment) -> dict[str, float]:
        """CPUs that others kept busy and that the host took away, on average, and the load average."""
        seconds = max(end.clock - self.clock, 1e-9)
        others = max(end.busy - self.busy - (end.ours - self.ours), 0) / seconds
        stolen = (end.stolen - self.stolen) / seconds
        return {
            "others_cpus": round(others, 2),
            "stolen_cpus": round(stolen, 2),
            "average": round(os.getloadavg()[0], 2),
            "seconds": round(seconds),
        }


def _stat_line() -> str:
    with Path("/proc/stat").open() as file:
        return file.readline()


def machine() -> dict[str, Any]:
    """What a figure depends on besides the program."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    kernel = os.uname()
    return {
        "processor": processor[0].partition(":")[2].strip() if processor else kernel.machine,
        "cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{kernel.sysname} {kernel.release} {kernel.machine}",
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that was measured, with a + if files other than pages were changed; empty without a repository."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False).stdout
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!docs"], capture_output=True, check=False)
    return name.strip() + "+" * (changed.returncode == 1)


def sha256_rate() -> float:
    """Bytes a second of SHA-256 on one core, from a block that is in its cache."""
    block, digest = bytes(1 << 18), hashlib.sha256()
    began = time.perf_counter()
    for _ in range(_HASHED):
        digest.update(block)
    return _HASHED * len(block) / (time.perf_counter() - began)


@dataclass(frozen=True)
class Cost:
    """Seconds until a command ended, until what it wrote was on the disk, and of processors; its memory at its peak.

    The peak is the largest of its processes as the kernel says, or of all together (PSS) ten times a second if larger.
    """

    wall_s: float
    disk_s: float
    cpu_s: float
    peak_mb: float


# A process has for its peak at least what its parent had when it was started, so a small one starts the command.
_SMALL = """
import json, os, pathlib, sys, threading, time
peak, ended = [0], threading.Event()
def tree(pid):
    yield pid
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from tree(child)
def pss(pid):
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
def look(pid):
    while not ended.wait(0.1):
        try:
            peak[0] = max(peak[0], sum(map(pss, tree(pid))))
        except OSError:  # one of them has just ended
            pass
began = time.perf_counter()
null = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=null)
threading.Thread(target=look, args=(pid,)).start()
_, status, usage = os.wait4(pid, 0)
written = time.perf_counter() - began
ended.set()
os.sync()
on_disk = time.perf_counter() - began
print(json.dumps([status, written, on_disk, usage.ru_utime + usage.ru_stime, max(usage.ru_maxrss, *peak) / 1024]))
"""


def run(command: list[str]) -> Cost:
    """Run a command, with the processes it waits for; SystemExit with what it said if it fails."""
    small = [sys.executable, "-S", "-E", "-c", _SMALL, *command]
    done = subprocess.run(small, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        sys.exit(f"{command[:3]} was not started:\n{done.stderr[-2000:]}")
    status, *figures = json.loads(done.stdout)
    if status:
        sys.exit(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
    return Cost(*figures)
