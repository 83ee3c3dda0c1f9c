"""A board's file tree without a system: its systemctl runs the daemon, and its rkedge is the one under test."""

from __future__ import annotations

import contextlib
import ensurepip
import os
import shutil
import signal
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkboard.deploy.there.ground import Ground
from rkboard.deploy.there.service import Service

SYSTEMCTL = """\
#!{python}
import os, re, signal, subprocess, sys, time
root = {root!r}
pid_file = root + "/run/daemon.pid"
verb, words = sys.argv[1], sys.argv[2:]
with open(root + "/run/systemctl.log", "a") as log:
    print(*sys.argv[1:], file=log)

def cut(when):
    # Kills what has called it, once: before the verb does anything, or after.
    path = f"{{root}}/run/{{when}}-{{verb}}"
    if os.path.exists(path):
        os.unlink(path)
        os.kill(os.getppid(), signal.SIGKILL)
        if when == "before":
            sys.exit(0)

def alive():
    try:
        pid = int(open(pid_file).read())
        os.kill(pid, 0)
        return pid if open(f"/proc/{{pid}}/stat").read().split()[2] != "Z" else 0
    except (OSError, ValueError):
        return 0

def stop():
    pid = alive()
    if pid:
        os.kill(pid, signal.SIGTERM)
        while alive():
            time.sleep(0.02)

def start():
    text = open(root + "/etc/systemd/system/rkedge.service.d/deploy.conf").read()
    line = re.findall(r"^ExecStart=(.+)", text, re.M)[-1]
    words = [root + word if word.startswith(("/opt", "/etc")) else word for word in line.split()]
    environment = dict(os.environ, RUNTIME_DIRECTORY=root + "/run/rkedge", STATE_DIRECTORY=root + "/var/lib/rkedge",
                       CACHE_DIRECTORY=root + "/var/cache/rkedge", HOME=root + "/var/lib/rkedge")
    try:
        for each in open(root + "/opt/rkedge/current/environment"):
            name, _, value = each.strip().partition("=")
            environment[name] = value
    except OSError:
        pass
    socket = root + "/run/rkedge/rkedge.sock"
    if os.path.exists(socket):
        os.unlink(socket)
    os.makedirs(root + "/run/rkedge", exist_ok=True)
    log = open(root + "/run/daemon.log", "ab")
    process = subprocess.Popen([*words, "--socket", socket], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                               env=environment, start_new_session=True)
    open(pid_file, "w").write(str(process.pid))

cut("before")
if verb == "show":
    print("active" if alive() else "inactive")
elif verb == "restart" and "rkedge.service" in words:
    stop()
    start()
elif verb == "reload":
    os.kill(alive(), signal.SIGHUP)
elif verb == "disable":
    stop()
cut("after")
"""
SYSTEMD_RUN = """\
#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    word = words.pop(0)
    if word.startswith("--setenv="):
        name, _, value = word[len("--setenv="):].partition("=")
        os.environ[name] = value
os.execv(words[0], words)
"""
PROGRAM = """\
import os
import sys


def main():
    os.execv({python!r}, [{python!r}, "-m", "rkruntime.cli", *sys.argv[1:]])


if __name__ == "__main__":
    main()
"""


@dataclass
class Tree:
    """A board."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "opt/rkedge"

    @property
    def service(self) -> Service:
        return Service(Ground(str(self.root)))

    def ask(self, question: str, patience: float = 60) -> str | None:
        """The answer of the daemon, if it answers."""
        body = {
            "model": "x",
            "messages": [{"role": "user", "content": question}],
            "stream": False,
            "options": {"temperature": 0},
        }
        answer = self.service.ask("/api/chat", body, patience)
        return answer[2]["message"]["content"] if answer and answer[0] == 200 else None

    def in_use(self, which: str = "current") -> dict[str, str] | None:
        service = self.service
        return service.made_of(service.named(self.home / which))

    def calls(self) -> str:
        return (self.root / "run/systemctl.log").read_text()

    def stop(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.root / "run/daemon.pid").read_text()), signal.SIGTERM)

    def outside(self) -> dict[str, Any]:
        """All files that are nobody's but the system's: what each is, by its path."""
        own = ("opt/rkedge", "run", "var/lib/rkedge", "var/cache/rkedge")
        return {
            name: (
                str(path.readlink()) if path.is_symlink() else path.stat().st_mode,
                path.is_file() and path.read_bytes(),
            )
            for path in sorted(self.root.rglob("*"))
            if not (name := str(path.relative_to(self.root))).startswith(own)
        }


def plant(folder: Path) -> Tree:
    """A new one."""
    root = folder / "root"
    for name in ("run", "opt", "var/lib", "var/cache", "usr/bin", "usr/local/bin", "usr/lib/sysusers.d"):
        (root / name).mkdir(parents=True)
    for name in ("systemd/system", "udev/rules.d"):
        (root / "etc" / name).mkdir(parents=True)
    (root / "etc/hostname").write_text("board\n")
    systemctl = root / "usr/bin/systemctl"
    systemctl.write_text(SYSTEMCTL.format(python=sys.executable, root=str(root)))
    systemctl.chmod(0o755)
    run = root / "usr/bin/systemd-run"
    run.write_text(SYSTEMD_RUN.format(python=sys.executable))
    run.chmod(0o755)
    return Tree(root)


def wheels(folder: Path) -> dict[str, Path]:
    """A pip, and a program that runs the RKEdge under test."""
    folder.mkdir()
    places = [Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels")]
    pip = next(found for place in places for found in place.glob("pip-*.whl"))
    shutil.copy(pip, folder / pip.name)
    own = folder / "rkedge-0.1.0-py3-none-any.whl"
    info = "rkedge-0.1.0.dist-info"
    files = {
        "rkruntime/__init__.py": "",
        "rkruntime/cli.py": PROGRAM.format(python=sys.executable),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: rkedge\nVersion: 0.1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": textwrap.dedent("""\
            [console_scripts]
            rkedge = rkruntime.cli:main
            """),
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(own, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return {path.name: path for path in sorted(folder.iterdir())}
