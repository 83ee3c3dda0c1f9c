"""Look at a board, change nothing, and print what was found as one line of JSON.

`rkedge doctor` sends this file to `python3 -I -` on a board, so it imports nothing but the standard library and runs on
Python 3.7 and later. Whatever is in the file tree, the document is bounded in size and in time: special files are not
read, endless ones are cut, and what hangs in the kernel is named. `rkboard/doctor/document.py` describes the fields.

Paths are relative to the root of the file tree, `--root DIR` or /. Symbolic links are followed within it.
"""

from __future__ import annotations

import errno
import fnmatch
import grp
import json
import mmap
import os
import platform
import pwd
import re
import resource
import shutil
import socket
import stat
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

SCHEMA = "rkedge-probe/1"
MARK = "rkedge-probe: "
SECONDS = 20.0
MOST_TEXT = 16 << 10  # bytes of a file
MOST_FILTERED = 8 << 20  # bytes of a file from which only the lines that match a pattern are kept
MOST_LINES = 200
MOST_NAMES = 1024  # of a folder; the device tree of a board has half as many
MOST_FILES = 4000
MOST_TOTAL = 4 << 20  # characters of the document
MOST_PROCESSES = 8192
MOST_SHOWN = 48
MOST_LIBRARIES = 16
MOST_LIBRARY = 128 << 20
SOCKET = "/run/rkedge/rkedge.sock"
METRICS = "run/rkedge/rkedge.sock/metrics"  # not a file: the daemon's answer to GET /metrics
LIBRARY = re.compile(r"librkllmrt\.so(?:\.[\d.b]{1,16})?\Z")

_CPU, _DEVFREQ, _TREE = "sys/devices/system/cpu", "sys/class/devfreq/*", "proc/device-tree"
# Files that may change while a model answers.
CLOCKS = (
    *(f"{_DEVFREQ}/{name}" for name in ("governor", "available_governors", "cur_freq", "min_freq", "max_freq")),
    f"{_DEVFREQ}/available_frequencies {_DEVFREQ}/userspace/set_freq",
    *(
        f"{_CPU}/cpufreq/policy*/scaling_{name}"
        for name in ("governor", "available_governors", "available_frequencies")
    ),
    *(f"{_CPU}/cpufreq/policy*/scaling_{name}" for name in ("cur_freq", "min_freq", "max_freq", "setspeed")),
    f"{_CPU}/cpufreq/policy*/cpuinfo_max_freq",
    "sys/class/thermal/thermal_zone*/type sys/class/thermal/thermal_zone*/temp",
    "sys/class/thermal/cooling_device*/type sys/class/thermal/cooling_device*/cur_state",
)
FILES = (
    "proc/meminfo proc/mounts proc/sys/kernel/osrelease proc/1/cgroup proc/1/comm",
    "proc/rknpu/version etc/os-release etc/debian_version etc/ld.so.conf etc/ld.so.conf.d/*.conf",
    "etc/rkedge/daemon.yaml etc/systemd/system/rkedge.service",
    "usr/lib/systemd/system/rkedge.service etc/udev/rules.d/60-rkedge.rules usr/lib/udev/rules.d/60-rkedge.rules",
    f"{_TREE}/compatible {_TREE}/model {_TREE}/npu@*/status {_TREE}/iommu@*/status",
    "sys/firmware/devicetree/base/compatible sys/firmware/devicetree/base/npu@*/status",
    "sys/module/rknpu/version sys/module/rknpu/taint sys/module/rknpu/parameters/bypass_irq_handler",
    "sys/module/rknpu/parameters/bypass_soft_reset",
    "sys/kernel/debug/rknpu/version sys/kernel/debug/rknpu/reset sys/class/drm/*/device/uevent",
    f"{_DEVFREQ}/upthreshold {_CPU}/online {_CPU}/possible {_CPU}/cpu*/cpu_capacity {_CPU}/cpu*/cpuidle/state1/disable",
    f"{_CPU}/cpufreq/policy*/related_cpus",
    *CLOCKS,
    "sys/block/*/queue/read_ahead_kb",
    "sys/fs/cgroup/memory.max sys/fs/cgroup/memory.current",
    "sys/fs/cgroup/system.slice/rkedge.service/cgroup.procs",
)
# Files that `rkedge top` shows and reads again and again.
LIVE = (
    *CLOCKS,
    "proc/meminfo proc/sys/kernel/osrelease proc/device-tree/model proc/rknpu/load sys/kernel/debug/rknpu/load",
)
LIVE_FOLDERS = (f"{_CPU}/cpufreq sys/class/devfreq sys/class/thermal",)
FOLDERS = (
    "sys/class/drm sys/class/misc sys/class/devfreq sys/class/thermal sys/block sys/module sys/bus/platform/drivers",
    f"{_CPU}/cpufreq run/systemd/system run/systemd/timesync dev/accel proc/device-tree",
)
LINKS = (
    "sys/class/drm/*/device sys/bus/platform/devices/*.npu/driver sys/bus/platform/devices/*.npu/iommu_group dev/rknpu",
)
NODES = ("dev/dri/* dev/accel/* dev/rknpu dev/dma_heap/* run/rkedge/rkedge.sock .dockerenv run/.containerenv",)
OPTIONS = re.compile(r"^(?:# )?CONFIG_(?:ROCKCHIP_RKNPU\w*|DRM_ACCEL_ROCKET|ARM_ROCKCHIP_DMC_DEVFREQ)\b")
MODULES = re.compile(r"/(?:rknpu|rocket)\.ko")
LOG = re.compile(r"rknpu|\bnpu\b|iommu|rockchip-dmc|rocket|swiotlb|hermal|oom-kill|Out of memory", re.I)


class Tree:
    """A file tree whose symbolic links are followed within it."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def real(self, path: str) -> str:
        """Return the path with all links resolved. Raises OSError for too many of them."""
        left = path.split("/")[::-1]
        found: list[str] = []
        hops = 0
        while left:
            part = left.pop()
            if part == "..":
                found = found[:-1]
            elif part not in ("", "."):
                try:
                    target = os.readlink(os.path.join(self.root, *found, part))
                except OSError:
                    found.append(part)
                    continue
                hops += 1
                if hops > 40 or len(target) > 4096:
                    raise OSError(errno.ELOOP, "too many links")
                found = [] if target.startswith("/") else found
                left += target.split("/")[::-1]
        return "/".join(found)

    def place(self, path: str) -> str:
        """Return the path by which this process opens the file."""
        return os.path.join(self.root, self.real(path))

    def names(self, path: str) -> list[str]:
        """Return the names in a folder, up to a bound. Raises OSError."""
        found = []
        with os.scandir(self.place(path)) as entries:
            for entry in entries:
                found.append(entry.name)
                if len(found) >= MOST_NAMES * 16:
                    break
        return sorted(found)

    def matching(self, pattern: str, failed: Callable[[str, OSError], None], begin: int = 0) -> Iterator[str]:
        """Yield the paths that match a pattern; without `*`, the path itself whether it exists or not.

        `failed` is called for each folder that cannot be listed. The part before `begin` has been found already: a `*`
        in it is literal.
        """
        star = pattern.find("*", begin)
        if star < 0:
            yield pattern
            return
        folder, _, start = pattern[:star].rpartition("/")
        end, slash, rest = pattern[star + 1 :].partition("/")
        try:
            names = self.names(folder)
        except OSError as error:
            failed(folder, error)
            return
        for name in fnmatch.filter(names, f"{start}*{end}")[:MOST_NAMES]:
            found = f"{folder}/{name}"
            yield from self.matching(f"{found}{slash}{rest}", failed, len(found))

    def open(self, path: str) -> int:
        """Open a regular file. Raises OSError for anything else: a FIFO would block, and a device has no end."""
        handle = os.open(self.place(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file")

    def read(self, path: str, most: int) -> tuple[bytes, bool]:
        """Return the first bytes of a regular file, and whether there are more. Raises OSError."""
        handle, data = self.open(path), b""
        try:
            while len(data) <= most:
                block = os.read(handle, most + 1 - len(data))
                if not block:
                    break
                data += block
        finally:
            os.close(handle)
        return data[:most], len(data) > most


def code_of(error: BaseException) -> str:
    """Return an error in one word, such as EACCES."""
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, type(error).__name__) if number else type(error).__name__


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class Probe:
    """The probe: fills `found` part by part, and holds `lock` while that changes."""

    def __init__(self, root: str) -> None:
        self.tree, self.whole = Tree(root), os.path.abspath(root) == "/"
        self.lock, self.at, self.left = threading.Lock(), "", MOST_TOTAL
        self.found: dict[str, Any] = {
            "schema": SCHEMA, "root": self.tree.root, "files": {}, "folders": {}, "links": {}, "nodes": {},
            "processes": [], "libraries": [], "disks": {}, "log": [], "problems": [],
        }  # fmt: skip

    def run(self) -> None:
        """Look at everything, in order of importance."""
        self.do(
            self.me, self.names_of_accounts, self.files, self.folders, self.links, self.nodes, self.kernel,
            self.libraries, self.disks, self.processes, self.log, self.daemon,
        )  # fmt: skip

    def do(self, *parts: Callable[[], None]) -> None:
        for part in parts:
            try:
                part()
            except Exception as error:  # a part that fails does not affect the others
                self.problem(f"{part.__name__}: {code_of(error)}")

    def put(self, section: str, key: str, value: Any) -> None:
        if self.has_room({key: value}):
            with self.lock:
                self.found[section][key] = value

    def add(self, section: str, value: Any) -> None:
        if self.has_room(value):
            with self.lock:
                self.found[section].append(value)

    def has_room(self, value: Any) -> bool:
        """Whether the document has room for a value, which then takes it; notes a problem if not."""
        size = len(json.dumps(value))
        if size > self.left:
            self.problem("there is more than the document has room for")
            return False
        self.left -= size
        return True

    def problem(self, text: str) -> None:
        with self.lock:
            if len(self.found["problems"]) < 32 and text not in self.found["problems"]:
                self.found["problems"].append(text[:200])

    def each(self, patterns: tuple[str, ...]) -> Iterator[str]:
        """Yield the paths of patterns, up to MOST_FILES; `at` names the current one, in case reading it hangs."""
        number = 0
        for pattern in " ".join(patterns).split():
            for path in self.tree.matching(pattern, self.unread):
                number += 1
                if number > MOST_FILES:
                    self.problem(f"more than {MOST_FILES} paths")
                    return
                self.at = path
                yield path

    def put_text(self, path: str, read: Callable[[], tuple[str, bool]]) -> None:
        """Note the text of a file, or why it cannot be read."""
        try:
            text, more = read()
        except OSError as error:
            self.unread(path, error)
            return
        self.put("files", path, {"text": text, "more": True} if more else {"text": text})

    def unread(self, path: str, error: OSError) -> None:
        """Note why a file or a folder cannot be read, unless it is not there."""
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            self.put("files", path, {"error": code_of(error)})

    def clocks(self) -> None:
        """Look at what may change while a model answers: quick enough to be repeated."""
        self.files(CLOCKS)

    def files(self, patterns: tuple[str, ...] = FILES) -> None:
        def read() -> tuple[str, bool]:
            data, more = self.tree.read(self.at, MOST_TEXT)
            return text_of(data), more

        for path in self.each(patterns):
            self.put_text(path, read)

    def live(self) -> None:
        """Look at what changes from second to second, for `rkedge top`."""
        self.do(self.me, lambda: self.files(LIVE), lambda: self.folders(LIVE_FOLDERS), self.daemon_at_work)

    def folders(self, patterns: tuple[str, ...] = FOLDERS) -> None:
        for path in self.each(patterns):
            try:
                self.put("folders", path, self.tree.names(path)[:MOST_NAMES])
            except OSError as error:
                self.unread(path, error)

    def links(self) -> None:
        """Note the targets of the links that exist, fully resolved."""
        for path in self.each(LINKS):
            try:
                folder, _, name = path.rpartition("/")
                if os.path.islink(os.path.join(self.tree.place(folder), name)):
                    self.put("links", path, self.tree.real(path))
            except OSError as error:
                self.put("files", path, {"error": code_of(error)})

    def me(self) -> None:
        """Note the user, the limits and the Python of this process."""
        groups = sorted({os.getegid(), *os.getgroups()})
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with self.lock:
            self.found["me"] = {
                "uid": os.geteuid(),
                "user": "",
                "groups": groups[:256],
                "known_groups": {},
                "open_files": [None if value == resource.RLIM_INFINITY else value for value in (soft, hard)],
                # For another tree, as many cores as any board has: this process's own do not count.
                "cpus": sorted(os.sched_getaffinity(0))[:1024] if self.whole else list(range(64)),
                "python": platform.python_version(),
                "bits": 64 if sys.maxsize > 1 << 32 else 32,
                "machine": platform.machine() if self.whole else "",
                "libc": " ".join(platform.libc_ver())[:80],
                "venv": bool(find_spec("venv") and find_spec("ensurepip")),
                "sudo": shutil.which("sudo") is not None,
                "time": time.time(),
                "library_path": os.environ.get("LD_LIBRARY_PATH", "")[:4096],
            }

    def names_of_accounts(self) -> None:
        """Note the user's name and the NPU's groups; apart from `me`, because a directory service may not answer."""
        self.at = "etc/passwd"
        for name in ("video", "render"):
            try:
                self.found["me"]["known_groups"][name] = grp.getgrnam(name).gr_gid
            except KeyError:
                pass
        try:
            self.found["me"]["user"] = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            pass

    def nodes(self) -> None:
        npu = {name for name in self.found["folders"].get("sys/class/drm", []) if self.is_npu(name)}
        for path in self.each(NODES):
            whole = os.path.join(self.tree.root, path)
            try:
                own, node = os.lstat(whole), os.stat(self.tree.place(path))
            except OSError as error:
                if os.path.islink(whole):
                    broken = {"kind": "broken link", "mode": 0, "uid": 0, "gid": 0, "access": False, "link": True}
                    self.put("nodes", path, broken)
                else:
                    self.unread(path, error)
                continue
            fact = {
                "kind": kind_of(node.st_mode), "mode": stat.S_IMODE(node.st_mode), "uid": node.st_uid,
                "gid": node.st_gid, "access": os.access(self.tree.place(path), os.R_OK | os.W_OK),
                "link": stat.S_ISLNK(own.st_mode),
            }  # fmt: skip
            if self.whole and stat.S_ISCHR(node.st_mode) and (path.split("/")[-1] in npu or path == "dev/rknpu"):
                fact.update(ask_node(whole, path == "dev/rknpu"))
            self.put("nodes", path, fact)

    def is_npu(self, name: str) -> bool:
        device = f"sys/class/drm/{name}/device"
        said = self.found["files"].get(f"{device}/uevent", {}).get("text", "")
        return "DRIVER=RKNPU" in said.split("\n") or self.found["links"].get(device, "").endswith(".npu")

    def kernel(self) -> None:
        """Note the options and the modules of the kernel that concern the NPU."""
        release = self.found["files"].get("proc/sys/kernel/osrelease", {}).get("text", "").strip()
        if not re.match(r"[\w.+~-]{1,128}\Z", release):
            return
        for path, kept in (
            (f"boot/config-{release}", OPTIONS), ("proc/config.gz", OPTIONS),
            (f"lib/modules/{release}/modules.dep", MODULES), (f"lib/modules/{release}/modules.builtin", MODULES),
        ):  # fmt: skip
            self.at = path
            self.put_text(path, lambda: (self.lines(path, kept), False))  # noqa: B023 - called at once

    def lines(self, path: str, kept: Any) -> str:
        data, _ = self.tree.read(path, MOST_FILTERED)
        if path.endswith(".gz"):
            try:
                data = zlib.decompressobj(31).decompress(data, MOST_FILTERED)
            except zlib.error:
                raise OSError(errno.EBADMSG, "it is not a gzip file") from None
        return "\n".join([line[:512] for line in text_of(data).split("\n") if kept.search(line)][:MOST_LINES])

    def log(self) -> None:
        """Note the lines of the kernel's log about the NPU, its clocks, temperature and memory."""
        lines: list[str] = []
        self.at = "dev/kmsg"
        try:
            if not self.whole:
                raise OSError(errno.ENOENT, "not of this tree")
            lines = [line.split(";", 1)[-1].split("\n")[0] for line in kernel_messages()]
        except OSError as error:
            if self.whole:
                self.put("files", "dev/kmsg", {"error": code_of(error)})
            self.at = "var/log/dmesg"
            try:
                lines = text_of(self.tree.read("var/log/dmesg", MOST_FILTERED)[0]).split("\n")
            except OSError as other:
                if other.errno != errno.ENOENT:
                    self.put("files", "var/log/dmesg", {"error": code_of(other)})
        for line in [line[:300] for line in lines if LOG.search(line)][-MOST_LINES:]:
            self.add("log", line)

    def disks(self) -> None:
        for path in ("", "var/lib/rkedge", "opt"):
            self.at = path or "/"
            try:
                space = os.statvfs(self.tree.place(path))
            except OSError:
                continue
            free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
            self.put("disks", f"/{path}", {"free": free, "size": size})

    def processes(self) -> None:
        """Note the processes that have the NPU open, then those with the most memory."""
        rows: list[dict[str, Any]] = []
        hidden = 0
        try:
            names = self.tree.names("proc")
        except FileNotFoundError:
            return
        for name in [name for name in names if re.match(r"[0-9]+\Z", name)][:MOST_PROCESSES]:
            self.at = f"proc/{name}"
            row = self.process(name)
            if row:
                hidden += row.pop("hidden")
                rows.append(row)
        rows.sort(key=lambda row: (-len(row["nodes"]), -row["memory"]))
        with self.lock:
            self.found["processes"], self.found["hidden_processes"] = rows[:MOST_SHOWN], hidden

    def process(self, name: str) -> dict[str, Any] | None:
        folder, nodes, hidden = f"proc/{name}", set(), 0
        try:
            comm = text_of(self.tree.read(f"{folder}/comm", 64)[0]).strip()
            pages = self.tree.read(f"{folder}/statm", 128)[0].split()
            owner = os.stat(self.tree.place(folder)).st_uid
        except OSError:
            return None  # the process has ended
        try:
            for descriptor in self.tree.names(f"{folder}/fd")[:4096]:
                target = os.readlink(os.path.join(self.tree.root, folder, "fd", descriptor))
                if re.match(r"/dev/(?:dri/(?:card|renderD)\d+|rknpu|accel/accel\d+)\Z", target):
                    nodes.add(target)
        except OSError as error:
            hidden = int(error.errno in (errno.EACCES, errno.EPERM))
        resident = int(pages[1]) if len(pages) > 1 and pages[1].isdigit() and len(pages[1]) < 16 else 0
        memory = resident * resource.getpagesize()
        return {
            "pid": int(name[:9]), "name": comm[:64], "uid": owner, "memory": memory,
            "nodes": sorted(nodes)[:16], "me": self.whole and int(name) == os.getpid(), "hidden": hidden,
        }  # fmt: skip

    def libraries(self) -> None:
        """Note every librkllmrt.so in the places where it is searched, in that order."""
        named, loader = self.library_folders()
        seen: set[str] = set()
        for folder in [*named, *loader, "opt/rkedge/lib", "opt/rkllm/lib", "var/lib/rkedge/lib", "usr/local/lib/rkllm"]:
            self.at = folder
            try:
                names = [name for name in self.tree.names(folder) if LIBRARY.match(name)]
            except OSError:
                names = []
            for name in names[:MOST_NAMES]:
                path = f"{folder}/{name}"
                try:
                    real = self.tree.real(path)
                except OSError:
                    continue
                if real not in seen and len(seen) < MOST_LIBRARIES:
                    seen.add(real)
                    self.at = path
                    self.add("libraries", self.library(path, folder in loader, [*loader, os.path.dirname(real)]))

    def library_folders(self) -> tuple[list[str], list[str]]:
        """Return the folders that the environment or the daemon's settings name, and those of the loader."""
        named = os.environ.get("LD_LIBRARY_PATH", "").split(":") if self.whole else []
        settings = self.found["files"].get("etc/rkedge/daemon.yaml", {}).get("text", "")
        named += [os.path.dirname(path) for path in re.findall(r"^library:\s*[\"']?(/[^\s\"'#]+)", settings, re.M)]
        configured = [
            line.strip()
            for path, read in sorted(self.found["files"].items())
            if path.startswith("etc/ld.so.conf")
            for line in read.get("text", "").split("\n")
            if line.strip().startswith("/")
        ]
        machine = "aarch64-linux-gnu" if not self.whole else f"{platform.machine()}-linux-gnu"
        usual = ["usr/lib", "usr/local/lib", f"usr/lib/{machine}", f"lib/{machine}", "lib", "lib64", "usr/lib64"]
        tidy = [[path.strip("/") for path in paths if path.startswith("/")][:32] for paths in (named, configured)]
        return tidy[0], list(dict.fromkeys([*usual, *tidy[1]]))

    def library(self, path: str, loader: bool, folders: list[str]) -> dict[str, Any]:
        fact: dict[str, Any] = {"path": f"/{path}", "loader": loader}
        try:
            handle = self.tree.open(path)
            try:
                size = os.fstat(handle).st_size
                fact["size"] = size
                with mmap.mmap(handle, min(size, MOST_LIBRARY), access=mmap.ACCESS_READ) as data:
                    fact.update(elf_facts(data))
            finally:
                os.close(handle)
        except (OSError, ValueError, struct.error, OverflowError) as error:
            fact["error"] = code_of(error)
        fact["missing"] = [name for name in fact.get("needs", []) if not self.is_there(name, folders)]
        return fact

    def is_there(self, name: str, folders: list[str]) -> bool:
        for folder in folders:
            try:
                if "/" not in name and os.path.exists(self.tree.place(f"{folder}/{name}")):
                    return True
            except (OSError, ValueError):
                pass
        return False

    def daemon(self) -> None:
        """Note the daemon's status."""
        if self.whole:
            self.ask_daemon("status", SOCKET.lstrip("/"))

    def daemon_at_work(self) -> None:
        """Note the daemon's status and its counters for Prometheus."""
        self.ask_daemon("status", SOCKET.lstrip("/"))
        self.ask_daemon("metrics", METRICS)

    def ask_daemon(self, what: str, name: str) -> None:
        """Note what the daemon answers, or why it does not, as if `name` were a file."""
        self.at = SOCKET.lstrip("/")
        place = self.tree.place(self.at)
        if not os.path.exists(place):
            return
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(2)
            end = time.monotonic() + 4
            try:
                link.connect(place)
                link.sendall(f"GET /{what} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                answer = b""
                while len(answer) < 1 << 16 and time.monotonic() < end:
                    block = link.recv(1 << 14)
                    if not block:
                        break
                    answer += block
            except OSError as error:
                self.put("files", name, {"error": code_of(error)})
                return
        self.put("files", name, {"text": text_of(answer.partition(b"\r\n\r\n")[2])[:MOST_TEXT]})


def kind_of(mode: int) -> str:
    for test, name in ((stat.S_ISCHR, "device"), (stat.S_ISSOCK, "socket"), (stat.S_ISREG, "file"),
                       (stat.S_ISDIR, "folder")):  # fmt: skip
        if test(mode):
            return name
    return "other"


# Layouts and request numbers of Linux's DRM_IOCTL_VERSION and of the rknpu driver's action ioctl on /dev/rknpu.
_DRM_VERSION = struct.Struct("@iiiLPLPLP")
_DRM_IOCTL_VERSION = 3 << 30 | _DRM_VERSION.size << 16 | ord("d") << 8
_ACTION, _IOCTL_ACTION, _GET_DRIVER_VERSION = struct.Struct("=II"), 0xC0087200, 1


def ask_node(path: str, legacy: bool) -> dict[str, Any]:
    """Open one of the NPU's nodes and ask for its driver: modes alone do not tell in a container or under SELinux."""
    import ctypes
    import fcntl

    try:
        handle = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return {"access": False, "error": code_of(error)}
    try:
        if legacy:
            asked = bytearray(_ACTION.pack(_GET_DRIVER_VERSION, 0))
            fcntl.ioctl(handle, _IOCTL_ACTION, asked)
            number = _ACTION.unpack(asked)[1]
            return {
                "access": True,
                "driver": "rknpu",
                "version": f"{number // 10000}.{number // 100 % 100}.{number % 100}",
            }
        name = ctypes.create_string_buffer(64)
        version = bytearray(_DRM_VERSION.pack(0, 0, 0, 63, ctypes.addressof(name), 0, 0, 0, 0))
        fcntl.ioctl(handle, _DRM_IOCTL_VERSION, version)
        major, minor, patch = _DRM_VERSION.unpack(version)[:3]
        return {"access": True, "driver": text_of(name.value), "version": f"{major}.{minor}.{patch}"}
    except OSError as error:
        return {"access": True, "error": code_of(error)}
    finally:
        os.close(handle)


def kernel_messages() -> Iterator[str]:
    """Yield the kernel's log records that are still in its buffer. Raises OSError."""
    handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for _ in range(50000):
            try:
                yield text_of(os.read(handle, 8192))
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten meanwhile
                continue
    finally:
        os.close(handle)


def elf_facts(data: mmap.mmap) -> dict[str, Any]:
    """Return a library's class, machine, needs, exports and version texts. Raises struct.error for a truncated file."""
    if data[:4] != b"\x7fELF" or len(data) < 64:
        return {"error": "not ELF"}
    facts: dict[str, Any] = {
        "bits": {1: 32, 2: 64}.get(data[4], 0),
        "elf_machine": struct.unpack_from("<H", data, 18)[0],
    }
    if facts["bits"] != 64 or data[5] != 1:
        return facts
    texts: list[str] = []
    for mark, before in ((b"RKLLM SDK (version: ", 0), (b"rkllm-runtime version: %s", 256)):
        at = data.find(mark)
        while at >= 0 and len(texts) < 16:
            texts.append(text_of(data[max(0, at - before) : at + 256]))
            at = data.find(mark, at + 1)
        facts["log_formats" if before else "version_texts"], texts = texts, []
    names, needed = dynamic_names(data)
    facts["needs"] = needed
    facts["functions"] = sorted({name for name in names if name.startswith("rkllm_")})[:256]
    glibc = [tuple(map(int, name[6:].split("."))) for name in names if re.match(r"GLIBC_\d{1,3}\.\d{1,3}\Z", name)]
    facts["glibc"] = ".".join(map(str, max(glibc))) if glibc else ""
    return facts


def dynamic_names(data: mmap.mmap) -> tuple[list[str], list[str]]:
    """Return all names in the dynamic string table, and those of needed libraries."""
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments, dynamic = [], b""
    for at in range(min(count, 256)):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, table + at * size)
        if kind == 1:
            segments.append((address, offset, length))
        elif kind == 2:
            dynamic = data[offset : offset + min(length, 1 << 16)]
    tags = [struct.unpack_from("<QQ", dynamic, at) for at in range(0, len(dynamic) - 15, 16)]
    values = dict(tags)
    start = next((values[5] - a + o for a, o, n in segments if 5 in values and a <= values[5] < a + n), None)
    if start is None:
        return [], []
    strings = data[start : start + min(values.get(10, 0), 1 << 20)]
    needed = [strings[at : strings.find(b"\0", at)] for tag, at in tags if tag == 1 and at < len(strings)]
    return [text_of(name) for name in strings.split(b"\0")], [text_of(name)[:128] for name in needed[:32]]


def look(probe: Probe, work: Callable[[], None]) -> tuple[str, bool]:
    """Return the document as a line, and whether everything answered in time."""
    begun, thread = time.monotonic(), threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        probe.problem(f"/{probe.at} did not answer in {SECONDS:.0f} seconds")
    with probe.lock:
        probe.found["seconds"] = round(time.monotonic() - begun, 3)
        return MARK + json.dumps(probe.found) + "\n", not thread.is_alive()


def main(words: list[str]) -> None:
    """Look once, or every so many seconds (`--every`) until nobody listens."""
    root, every = (words[words.index(name) + 1] if name in words[:-1] else "" for name in ("--root", "--every"))
    answered = True
    while answered:
        probe = Probe(root or "/")
        line, answered = look(probe, probe.live if every else probe.run)
        try:
            sys.stdout.write(line)
            sys.stdout.flush()
        except OSError:
            break
        if not every:
            break
        time.sleep(float(every))
    os._exit(0)  # a thread that hangs in the kernel would keep the process alive


if __name__ == "__main__":
    main(sys.argv[1:])
