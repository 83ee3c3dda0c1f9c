"""What a board needs in order to serve a bundle: the steps in order, with the files that each needs."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rkboard.deploy.session import names_of, text_of
from rkboard.deploy.wheels import Target
from rkruntime.bundle.manifest import MANIFEST, Bundle
from rkruntime.errors import LibraryError, RefusedError
from rkruntime.files import sha256_file
from rkruntime.library.identify import Identity, identify
from rkruntime.resources import resource

LIBRARY: Final = "librkllmrt.so"
_BUNDLE_SETTING: Final = re.compile(r"^bundle:\s*\S+", re.MULTILINE)
_BUNDLE_LINK: Final = "/opt/rkedge/bundle"
# systemd drop-in: the bundle, program and library of `current` override those of the settings and the system.
_DROP_IN: Final = f"""\
# Written by `rkedge deploy`, which changes what /opt/rkedge/current names.
[Service]
EnvironmentFile=-/opt/rkedge/current/environment
ExecStart=
ExecStart=/opt/rkedge/bin/rkedge serve --config /etc/rkedge/daemon.yaml {_BUNDLE_LINK}
"""

Files = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Planned:
    """A step, as the board is given it and as the person who confirms it sees it.

    Attributes:
        title: The subject of the step in one word.
        change: The change that it would make, for the person.
        step: The request to the board, in JSON.
        sources: Size and path of the files to send before the step, by SHA-256.
    """

    title: str
    change: str
    step: Mapping[str, Any]
    sources: Mapping[str, tuple[int, Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """The properties of a board that the plan depends on.

    Raises:
        RefusedError: Nothing can be deployed there as it is.
    """

    target: Target
    python: str

    @classmethod
    def of(cls, look: Mapping[str, Any], *, offline: bool = False) -> Facts:
        """Read them from the board's answer to `look`. `offline`: a file tree without a running system."""
        if look.get("foreign") is not False:
            raise RefusedError(
                "The board has an /opt/rkedge that was made by hand.",
                hint="Move it away, then deploy: sudo mv /opt/rkedge /opt/rkedge.old",
            )
        if look.get("packaged") is not False:
            raise RefusedError(
                "The board has the Debian package rkedge, whose units and user are named alike.",
                hint="Serve bundles with it (docs/packages.md), or remove it, then deploy: sudo apt remove rkedge",
            )
        if not offline and look.get("systemd") is not True:
            raise RefusedError("The board does not run systemd, which starts the daemon.", hint="docs/serve.md")
        machine, python, version = (text_of(look, key) for key in ("machine", "python", "python_version"))
        libc = look.get("libc")
        if not re.fullmatch(r"3\.\d{1,2}", version):
            raise RefusedError(
                f"The board has no Python 3.10 or newer (python3 is {text_of(look, 'own_python')[:20]}).",
                hint="On the board, with uv (https://docs.astral.sh/uv): "
                'sudo UV_PYTHON_INSTALL_DIR=/opt/uv "$(command -v uv)" python install 3.12',
            )
        if machine not in ("aarch64", "x86_64"):
            raise RefusedError(f"The board is a {machine[:40]}; RKLLM needs a 64-bit ARM one.", hint="")
        if (
            not isinstance(libc, list)
            or len(libc) != 2
            or libc[0] != 2
            or not isinstance(libc[1], int)
            or not 17 <= libc[1] < 100
        ):
            raise RefusedError("The board has no glibc 2.17 or newer, which the wheels are made for.", hint="")
        return cls(Target(version, machine, libc[1]), python)


def bundle_name(bundle: Bundle) -> str:
    """Return a bundle's name on a board: the plain characters of its folder's name, and a part of its fingerprint."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.path.resolve().name).strip(".-")[:100]
    return f"{plain or 'bundle'}-{bundle.manifest.fingerprint[:8]}"


def library_of(path: Path, machine: str) -> tuple[Identity, str]:
    """Identify a library and return its name on the board. Raises LibraryError if it must not be used there."""
    found = identify(path)
    if found.machine != machine:
        raise LibraryError(
            f"{path} is for {found.machine}, and the board is {machine}.", hint="Name the library for the board."
        )
    return found, f"{found.version}-{sha256_file(path)[:8]}"


def _system(title: str, path: str, content: bytes, **more: Any) -> Planned:
    text = base64.b64encode(content).decode()
    change = f"write {path}" + (", if there is none" if more.get("keep") else "")
    return Planned(title, change, {"key": path, "kind": "file", "path": path, "content": text, **more})


def _part(
    title: str, change: str, folder: str, name: str, paths: Mapping[str, Path], files: Files, info: Mapping[str, Any]
) -> Planned:
    step = {"key": f"{folder}/{name}", "kind": "part", "folder": folder, "name": name, "files": files, "info": info}
    return Planned(title, change, step, {files[file][1]: (files[file][0], paths[file]) for file in files})


def bundle_step(bundle: Bundle) -> Planned:
    """Return the step that puts the bundle's files, with its manifest, onto the board."""
    manifest, name = bundle.manifest, bundle_name(bundle)
    files: Files = {file: (record.size, record.sha256) for file, record in manifest.files.items()}
    own = bundle.path / MANIFEST
    files[MANIFEST] = (own.stat().st_size, sha256_file(own))
    paths = {file: bundle.path / file for file in files}
    size = sum(size for size, _ in files.values())
    info = {"fingerprint": manifest.fingerprint, "name": manifest.name, "size": size}
    return _part("bundle", f"{name}, {_bytes(size)}", "bundles", name, paths, files, info)


def library_step(path: Path, found: Identity, name: str) -> Planned:
    """Return the step that puts the vendor's library that the user named onto the board."""
    files: Files = {LIBRARY: (path.stat().st_size, sha256_file(path))}
    change = f"{found.version}{' (emulated)' if found.emulated else ''}, kept beside others in /opt/rkedge/libraries"
    return _part("library", change, "libraries", name, {LIBRARY: path}, files, {"version": found.version})


def program_step(facts: Facts, name: str, version: str, wheels: Mapping[str, Path], files: Files) -> Planned:
    """Return the step that installs RKEdge and its dependencies. Without `wheels` it only checks for them."""
    size = sum(size for size, _ in files.values())
    step = {
        "key": f"programs/{name}", "kind": "program",
        "folder": "programs", "name": name, "python": facts.python, "version": version,
        "wheels": files,
    }  # fmt: skip
    change = f"{name} in /opt/rkedge/programs, {_bytes(size)} of wheels" if files else name
    return Planned("program", change, step, {files[file][1]: (files[file][0], wheels[file]) for file in files})


def system_steps(account: str) -> tuple[list[Planned], list[Planned]]:
    """Return the steps that change the system before the parts come, and those after."""
    board = resource("board")
    settings = (resource("configs") / "daemon.yaml").read_text()
    settings = _BUNDLE_SETTING.sub(f"bundle: {_BUNDLE_LINK}", settings)
    units = "/etc/systemd/system"
    before = [
        _system("user", "/usr/lib/sysusers.d/rkedge.conf", (board / "systemd/rkedge.sysusers").read_bytes(),
                after="sysusers", user="rkedge"),
        _system("rights", "/etc/udev/rules.d/60-rkedge.rules", (board / "udev/60-rkedge.rules").read_bytes(),
                after="udev"),
    ]  # fmt: skip
    link = {"key": "command", "kind": "link", "path": "/usr/local/bin/rkedge", "target": "/opt/rkedge/bin/rkedge"}
    after = [
        _system("settings", "/etc/rkedge/daemon.yaml", settings.encode(), keep=True),
        *(
            _system("unit", f"{units}/{name}", (board / "systemd" / name).read_bytes(), after="systemd")
            for name in ("rkedge.service", "rkedge.socket")
        ),
        _system("unit", f"{units}/rkedge.service.d/deploy.conf", _DROP_IN.encode(), after="systemd"),
        Planned("command", "link /usr/local/bin/rkedge", link),
        Planned(
            "group",
            f"{account or 'the account that you log in with'} joins the group rkedge, and may chat",
            {"key": f"member/{account}", "kind": "member", "account": account},
        ),
    ]
    return before, after


def serve_step(parts: Mapping[str, str]) -> Planned:
    """Return the step that makes the daemon use these parts."""
    step = {"key": "serve", "kind": "serve", "parts": dict(parts)}
    return Planned("service", f"serve {parts['bundles']}", step)


def in_use(look: Mapping[str, Any], kind: str) -> str:
    """Return the name of the part of a kind that is in use; empty if there is none."""
    return text_of(names_of(look, "current"), kind)


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
