"""Build the emulated librkllmrt.so of one release from board/emulator, with the user's compiler, into a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkboard.emulator import abi_header, faults
from rkruntime import abi
from rkruntime.abi import DEFAULT_RELEASE, declarations, releases
from rkruntime.errors import HostError, UsageError
from rkruntime.files import atomic_file
from rkruntime.folders import own_folder
from rkruntime.resources import resource
from rkruntime.stop import Stop

LIBRARY: Final = "librkllmrt.so"


@dataclass(frozen=True)
class Kernel:
    """A source file for one instruction set; it is left out if the compiler does not know the flags."""

    source: str
    arch: str
    flags: tuple[str, ...]
    define: str


KERNELS: Final = (
    Kernel("kernels_avx2.cc", "x86_64", ("-mavx2", "-mfma"), "RKEMU_HAVE_AVX2"),
    Kernel(
        "kernels_avx512.cc", "x86_64", ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"), "RKEMU_HAVE_AVX512"
    ),
    Kernel("kernels_neon.cc", "aarch64", ("-march=armv8.2-a+dotprod",), "RKEMU_HAVE_NEON"),
    Kernel("kernels_i8mm.cc", "aarch64", ("-march=armv8.2-a+dotprod+i8mm",), "RKEMU_HAVE_I8MM"),
)
# The sources that depend on the layout; all others are shared by the releases.
ABI_SOURCES: Final = ("api.cc", "convert.cc")
EXPORTS: Final = "exports.map"

# -ffp-contract=off: equal float results on every machine. nodelete: a client may unload us while a thread exits.
_COMPILE: Final = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
_WARN: Final = ("-Wall", "-Wextra", "-Wpedantic")
_OPTIMIZE: Final = ("-O3", "-DNDEBUG")
_LINK: Final = ("-shared", "-pthread", f"-Wl,-soname,{LIBRARY}", "-Wl,-z,defs", "-Wl,-z,nodelete")
# An interpreter may bring an older libstdc++ than the compiler's (conda's does). The unwinder must be the
# process's own: with two, the first exception from a client's callback aborts the process.
_STATIC: Final = ("-static-libstdc++",)
_CROSS: Final = {"aarch64": ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")}
_ERROR_LINES: Final = 12

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, its version line, and the machine it compiles for."""

    command: tuple[str, ...]
    version: str
    arch: str


def _run(command: Sequence[str | Path], stop: Stop | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler. When `stop` is requested, it is killed with its children."""
    # The messages are shown to the user and searched for "error", so they must be in English.
    environment = os.environ | {"LC_ALL": "C"}
    plain, pipe = [str(part) for part in command], subprocess.PIPE
    if stop is None:  # Ctrl-C reaches the compiler, because it is in this process's group.
        return subprocess.run(plain, stdout=pipe, stderr=pipe, text=True, env=environment, check=False)
    with subprocess.Popen(
        plain, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    ) as process:

        def end() -> None:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

        try:
            with stop.ending(end):
                out, err = process.communicate()
        except BaseException:  # Also at Ctrl-C: in a session of its own, the compiler would go on.
            end()
            raise
    stop.check()
    return subprocess.CompletedProcess(plain, process.returncode, out, err)


def _lock(folder: int) -> bool:
    """Lock an open folder; False if another process holds the lock. Where locks fail, builds only repeat work."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def host_arch() -> str:
    """Return this machine's architecture as `arch` takes it: x86_64 or aarch64."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def find_compiler(arch: str | None = None) -> Compiler:
    """Find the compiler for `arch` (default: this machine): $CXX, g++ or clang++; a cross compiler for another machine.

    Raises:
        HostError: There is none.
    """
    arch = arch or host_arch()
    if arch == host_arch():
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        package = "g++"
    elif arch in _CROSS:
        names, package = [_CROSS[arch][0]], _CROSS[arch][1]
    else:
        raise UsageError(f"The emulator can be built for this machine or for {', '.join(_CROSS)}, not for {arch}.")
    for name in names:
        command = tuple(shlex.split(name))
        if command and shutil.which(command[0]):
            version = _run([*command, "--version"]).stdout.partition("\n")[0]
            return Compiler(command, version, arch)
    raise HostError(
        f"The emulator is built on this machine, but no C++ compiler was found (looked for {', '.join(names)}).",
        hint=f"Install one: sudo apt install {package}",
    )


def cache_folder() -> Path:
    """Return the folder in which built libraries are kept."""
    return own_folder("cache") / "emulator"


def check_release(release: str) -> None:
    """Raise UsageError if the emulator has no release of that name."""
    abi.check_release(release, abi.EMULATED, "The emulator")


class _Build:
    """The build of one library: what is compiled, with which flags, and where it goes."""

    def __init__(self, release: str, compiler: Compiler, sanitize: str | None, warnings_are_errors: bool) -> None:
        self.release, self.compiler = release, compiler
        self.sources = resource("emulator")
        extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g", "-O1"] if sanitize else [*_OPTIMIZE]
        self.flags = [*_COMPILE, *_WARN, *(["-Werror"] if warnings_are_errors else []), *extra]
        self.link_flags = [*_LINK, *([f"-fsanitize={sanitize}"] if sanitize else _STATIC)]
        if sanitize:
            self.link_flags.remove("-Wl,-z,defs")  # the sanitizer's symbols come from the program
        self.kernels = [kernel for kernel in KERNELS if kernel.arch == compiler.arch]
        self.folder = cache_folder() / self._digest()
        self.library = self.folder / release / LIBRARY

    def _knows(self, flags: Sequence[str]) -> bool:
        return _run([*self.compiler.command, *flags, "-fsyntax-only", "-xc++", os.devnull]).returncode == 0

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self.sources.iterdir()):
            if path.suffix in (".cc", ".h", ".map"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        for module in (declarations, releases, abi_header):
            digest.update(Path(str(module.__file__)).read_bytes())
        digest.update(repr(faults.sources()).encode())
        facts = (self.compiler, self.flags, self.link_flags, self.kernels)
        digest.update(repr(facts).encode())
        return digest.hexdigest()[:16]

    def _objects(self) -> list[tuple[Path, Path, list[str]]]:
        """Return source, object and flags of each object file."""
        known = {kernel.source: kernel.flags for kernel in self.kernels if self._knows(kernel.flags)}
        defines = [f"-D{kernel.define}" for kernel in self.kernels if kernel.source in known]
        left_out = {*ABI_SOURCES, *(kernel.source for kernel in KERNELS)} - set(known)
        objects = []
        for source in sorted(self.sources.glob("*.cc")):
            if source.name in left_out:
                continue
            flags = [*self.flags, *known.get(source.name, ()), *defines, f"-I{self.folder}"]
            objects.append((source, self.folder / "objects" / f"{source.stem}.o", flags))
        layout = [f"-I{self.library.parent}", "-DRKLLM_BOOL=uint8_t"]
        for name in ABI_SOURCES:
            source = self.sources / name
            objects.append((source, self.folder / self.release / f"{source.stem}.o", [*self.flags, *layout]))
        return objects

    def _make(self, target: Path, command: Sequence[str | Path], stop: Stop | None) -> None:
        """Run the compiler to write `target`, which appears complete or not at all."""
        if stop is not None:
            stop.check()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
            partial = Path(scratch) / target.name
            result = _run([*self.compiler.command, *command, "-o", partial], stop)
            if result.returncode != 0:
                raise self._failed(command, result)
            partial.replace(target)

    def _failed(self, command: Sequence[str | Path], result: subprocess.CompletedProcess[str]) -> HostError:
        lines = result.stderr.splitlines()
        first = next((i for i, line in enumerate(lines) if "error" in line), 0)
        full = "No space left on device" in result.stderr
        return HostError(
            f"The emulator's build failed ({self.compiler.version}, exit {result.returncode})."
            + (f" The disk of {self.folder} or of the folder for temporary files is full." if full else ""),
            hint="Free some space, or set XDG_CACHE_HOME and TMPDIR to folders elsewhere."
            if full
            else "Try another compiler with CXX=g++ or CXX=clang++ (g++ 9 or newer, clang++ 10 or newer).",
            details={
                "command": [*self.compiler.command, *map(str, command)],
                "lines": lines[first : first + _ERROR_LINES],
                "stderr": result.stderr[-8000:],
            },
        )

    @contextmanager
    def _alone(self, stop: Stop | None) -> Iterator[None]:
        """Wait while another process builds into the folder, so that what it compiles is not compiled twice."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            while not _lock(folder):
                if stop is not None:
                    stop.check()
                time.sleep(0.1)
            yield
        finally:
            os.close(folder)

    def run(self, progress: Progress | None, stop: Stop | None) -> Path:
        if self.library.is_file():
            return self.library
        self.library.parent.mkdir(parents=True, exist_ok=True)
        with self._alone(stop):
            if not self.library.is_file():
                self._build(progress, stop)
        return self.library

    def _build(self, progress: Progress | None, stop: Stop | None) -> None:
        made = {
            self.library.parent / abi_header.HEADER: abi_header.header(self.release),
            **{self.folder / name: text for name, text in faults.sources().items()},
        }
        for path, text in made.items():
            with atomic_file(path) as partial:
                partial.write_text(text, encoding="utf-8")
        objects = self._objects()
        missing = [entry for entry in objects if not entry[1].is_file()]
        done = 0

        def compile_one(entry: tuple[Path, Path, list[str]]) -> None:
            nonlocal done
            source, target, flags = entry
            self._make(target, [*flags, "-c", source], stop)
            done += 1
            if progress:
                progress(f"building the emulator for {self.release}: {done}/{len(missing)} {source.name}")

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, missing))
        exports = f"-Wl,--version-script={self.sources / EXPORTS}"
        self._make(self.library, [*self.link_flags, exports, *(target for _, target, _ in objects)], stop)


def build(
    release: str = DEFAULT_RELEASE,
    *,
    arch: str | None = None,
    sanitize: str | None = None,
    warnings_are_errors: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Path:
    """Return the emulator's library for a release; build it unless it is cached for these sources, compiler and flags.

    Args:
        release: One of rkruntime.abi.EMULATED.
        arch: x86_64 or aarch64; this machine's by default.
        sanitize: Value for the compiler's -fsanitize, such as `address,undefined`.
        warnings_are_errors: Fail on warnings, as in the project's own tests.
        progress: Called with a line per compiled file.
        stop: Stops the build from another thread.

    Returns:
        The file librkllmrt.so, in a folder of its own for LD_LIBRARY_PATH, with its header, abi.h.

    Raises:
        UsageError: There is no such release or machine.
        HostError: There is no compiler, it failed, or the cache folder cannot be written.
        ServiceError: The build was stopped.
    """
    check_release(release)
    try:
        return _Build(release, find_compiler(arch), sanitize, warnings_are_errors).run(progress, stop)
    except OSError as error:
        raise HostError(
            f"Cannot build the emulator in {cache_folder()}: {error.strerror or error}.",
            hint="Set XDG_CACHE_HOME to a writable folder.",
        ) from error


def library_path(release: str = DEFAULT_RELEASE, *, arch: str | None = None) -> Path:
    """Return where build() puts the library, whether or not it exists yet."""
    check_release(release)
    return _Build(release, find_compiler(arch), None, False).library
