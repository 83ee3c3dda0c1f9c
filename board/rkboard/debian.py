"""Build a Debian package: python -m rkboard.debian [--arch arm64] [--output build].

It has a virtual environment in /usr/lib/rkedge on the system's Python, with RKEdge and the wheels that it needs: those
that `rkedge deploy` brings, so that each board has the releases that the tests use. One package serves every Python
that has wheels, as the name of a compiled module contains the version of its Python.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from email import message_from_string
from email.utils import formatdate
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click

from rkboard.deploy.wheels import Target, downloaded, own_wheel, requirements
from rkruntime.errors import HostError, RKEdgeError
from rkruntime.files import atomic_file
from rkruntime.resources import resource
from rkruntime.terminal import say

HOME: Final = "usr/lib/rkedge"
PYTHONS: Final = ("3.10", "3.11", "3.12", "3.13", "3.14")
MACHINES: Final = {"arm64": "aarch64", "amd64": "x86_64"}
_LIBC: Final = 17
# Timestamp of every file (SOURCE_DATE_EPOCH overrides it), so that equal content gives an equal package.
_DATE: Final = "1577836800"
# The path of rkedge in the unit files; the package replaces it.
_BY_HAND: Final = "/opt/rkedge/bin/rkedge"
_PYVENV: Final = "home = /usr/bin\ninclude-system-site-packages = true\n"
_SCRIPT: Final = f"#!/{HOME}/bin/python\nimport sys\n\nfrom rkruntime.program import start\n\nsys.exit(start())\n"
_COPYRIGHT: Final = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Comment: The packages in /usr/lib/rkedge, whose full texts are in their folders:
{packages}

Files: *
Copyright: the authors of RKEdge, and those of the packages above
License: Apache-2.0
 On Debian systems, the text of the license is in
 /usr/share/common-licenses/Apache-2.0.
"""


def build(arch: str, output: Path, say: Callable[[str], None]) -> Path:
    """Build rkedge_VERSION_ARCH.deb with debhelper and write it into a folder; return its path.

    Raises:
        HostError: debhelper is missing or fails, or a wheel cannot be downloaded.
    """
    templates = resource("board") / "debian"
    if not templates.is_dir() or shutil.which("dpkg-buildpackage") is None or shutil.which("dh") is None:
        raise HostError(
            "A Debian package is built in a copy of the repository, by debhelper.",
            hint="On Debian or Ubuntu: sudo apt install debhelper",
        )
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="rkedge-deb-") as folder:
        source = Path(folder) / "rkedge"
        shutil.copytree(templates, source / "debian")
        _fill(source / "payload", arch, say)
        _system(source / "debian")
        _describe(source)
        _call(["dpkg-buildpackage", f"--host-arch={arch}", "-b", "-d", "-us", "-uc"], source)
        made = next(Path(folder).glob("rkedge_*.deb"))
        with atomic_file(output / made.name) as partial:
            shutil.copy(made, partial)
    return output / made.name


def _fill(payload: Path, arch: str, say: Callable[[str], None]) -> None:
    """Write the files as they will be on a board."""
    home = payload / HOME
    library = home / "lib/python3"
    wheels: list[Path | io.BytesIO] = [*_wheels(MACHINES[arch], say), io.BytesIO(own_wheel()[1])]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(library / "site-packages")
    for python in PYTHONS:
        (home / f"lib/python{python}").symlink_to("python3")
    (home / "pyvenv.cfg").write_text(_PYVENV)
    (home / "bin").mkdir()
    (home / "bin/python").symlink_to("/usr/bin/python3")
    (home / "bin/rkedge").write_text(_SCRIPT)
    (home / "bin/rkedge").chmod(0o755)
    (payload / "usr/bin").mkdir()
    (payload / "usr/bin/rkedge").symlink_to(f"../../{HOME}/bin/rkedge")
    (payload / "etc/rkedge").mkdir(parents=True)
    shutil.copy(resource("configs") / "daemon.yaml", payload / "etc/rkedge")


def _wheels(machine: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the wheels for the oldest Python, and the same releases of its compiled ones for the other Pythons."""
    oldest, *others = (Target(python, machine, _LIBC) for python in PYTHONS)
    found = [path for path in downloaded(oldest, requirements(oldest.python), say) if not path.name.startswith("pip-")]
    yield from found
    compiled = [path.name.split("-")[:2] for path in found if not re.search(r"-none-any\.whl$|-abi3-", path.name)]
    for target in others:
        yield from downloaded(target, [f"{name}=={release}" for name, release in compiled], say)


def _system(debian: Path) -> None:
    """Write the system's files under the names by which debhelper knows what they are."""
    board = resource("board")
    for path in sorted((board / "systemd").iterdir()):
        if path.suffix in (".service", ".socket"):
            name = path.name if path.stem == "rkedge" else f"rkedge.{path.name}"
            (debian / name).write_text(path.read_text().replace(_BY_HAND, "/usr/bin/rkedge"))
    shutil.copy(board / "systemd/rkedge.sysusers", debian / "rkedge.sysusers")
    shutil.copy(board / "udev/60-rkedge.rules", debian / "rkedge.udev")


def _describe(source: Path) -> None:
    """Write the package's changelog and licenses."""
    release, debian = version("rkedge"), source / "debian"
    when = formatdate(float(os.environ.get("SOURCE_DATE_EPOCH", _DATE)))
    owner = re.findall(r"^Maintainer: (.+)", (debian / "control").read_text(), re.MULTILINE)[0]
    news = "CHANGELOG.md in the repository has the changes."
    (debian / "changelog").write_text(
        f"rkedge ({release}) unstable; urgency=medium\n\n  * {news}\n\n -- {owner}  {when}\n"
    )
    infos = sorted((source / "payload" / HOME / "lib/python3/site-packages").glob("*.dist-info"))
    (debian / "copyright").write_text(_COPYRIGHT.format(packages="\n".join(map(_licence, infos))))


def _licence(info: Path) -> str:
    """Return a line about the license of a package, from its own metadata."""
    about = message_from_string((info / "METADATA").read_text())
    named = str(about.get("License-Expression") or about.get("License") or "\n")
    classes = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier", []) if text.startswith("License")]
    return f" {about['Name']} {about['Version']}: {', '.join(classes) if chr(10) in named else named}"


def _call(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", _DATE)}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [*done.stdout.splitlines()[-20:], *done.stderr.splitlines()[-20:]]
        raise HostError(f"{command[0]} ended with {done.returncode}.", details={"lines": lines})


@click.command()
@click.option(
    "--arch", type=click.Choice(list(MACHINES)), default="arm64", show_default=True, help="Build it for these."
)
@click.option("--output", type=click.Path(path_type=Path), default="build", show_default=True, help="Put it there.")
def main(arch: str, output: Path) -> None:
    """Build the Debian package of RKEdge."""
    try:
        say(str(build(arch, output, lambda text: say(text, err=True))))
    except RKEdgeError as error:
        say("\n".join(map(str, [error.message, error.hint, *error.details.get("lines", [])])), err=True)
        raise click.exceptions.Exit(error.exit_code) from None


if __name__ == "__main__":
    main()
