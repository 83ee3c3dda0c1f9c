"""The vendor's wheel as the user downloaded it: inspected before anything is installed."""

from __future__ import annotations

import platform
import re
import sys
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import Final

from rkconvert.rules.releases import ToolkitRelease, release
from rkconvert.tensors.shards import refuse_lfs_pointer
from rkruntime.errors import HostError, InputError
from rkruntime.files import open_regular, read_error

# PEP 427: name-version[-build]-python-abi-platform.whl
_NAME: Final = re.compile(
    r"(?P<name>\w[\w.]*)-(?P<version>[\w.+!]+)(-\d\w*)?-cp(?P<major>\d)(?P<minor>\d+)-\w+-(?P<platform>[\w.]+)\.whl"
)
_MOST_METADATA: Final = 1 << 20
_DOWNLOAD: Final = "Download it from the vendor's repository (airockchip/rknn-llm, folder rkllm-toolkit)."


@dataclass(frozen=True)
class Wheel:
    """A wheel of rkllm-toolkit.

    Attributes:
        release: Capabilities of its version.
        python: Python release that it is for, such as `3.12`.
        platform: Platform tag, such as `linux_x86_64`.
    """

    path: Path
    release: ToolkitRelease
    python: str
    platform: str


def read_wheel(path: Path) -> Wheel:
    """Inspect a wheel without unpacking it.

    Raises:
        InputError: Not a wheel, or not one of rkllm-toolkit.
        HostError: RKEdge does not support the release.
    """
    metadata, tag = _read_metadata(path)
    name, version = metadata.get("Name", ""), metadata.get("Version", "")
    if re.sub(r"[-_.]+", "-", name).lower() != "rkllm-toolkit":
        raise InputError(
            f"{path} is a wheel of {name or 'something without a name'}, not of rkllm-toolkit.", hint=_DOWNLOAD
        )
    match = _NAME.fullmatch(path.name)
    if not match or match["version"].replace("_", "+") != version.replace("_", "+"):
        raise InputError(
            f"{path} was renamed: pip reads version and Python from a wheel's name, but it contains {name} {version}.",
            hint=f"Restore the file's name: rkllm_toolkit-{version}-{tag}.whl",
        )
    python = f"{match['major']}.{match['minor']}"
    found = release(version)
    if python not in found.python:
        raise InputError(
            f"{path.name} is for Python {python}, but rkllm-toolkit {version} cannot be installed there"
            f" ({found.source('python')}).",
            hint=f"Use the wheel for Python {' or '.join(found.python)}.",
        )
    return Wheel(path.absolute(), found, python, match["platform"])


def _read_metadata(path: Path) -> tuple[dict[str, str], str]:
    """Return METADATA's headers, and the first tag in WHEEL."""
    try:
        with open_regular(path) as file:
            refuse_lfs_pointer(path, file.read(64), InputError)
            archive = zipfile.ZipFile(file)
            parts = {name.rpartition("/")[2]: name for name in archive.namelist() if name.count("/") == 1}
            texts = [_read_text(archive, parts[name]) for name in ("METADATA", "WHEEL")]
    except OSError as error:
        raise read_error(path, error) from error
    # zipfile's own: NotImplementedError for an unknown compression, RuntimeError for an encrypted file.
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a wheel, or its download is incomplete: {error}.",
            hint="A common cause is a web page saved as .whl: use the raw download.",
        ) from error
    metadata, wheel = (Parser().parsestr(text, headersonly=True) for text in texts)
    return {key: str(value) for key, value in metadata.items()}, str(wheel.get("Tag", "cp312-cp312-linux_x86_64"))


def _read_text(archive: zipfile.ZipFile, name: str) -> str:
    if archive.getinfo(name).file_size > _MOST_METADATA:
        raise ValueError(f"{name} has more than a MiB")
    return archive.read(name).decode("utf-8", "replace")


def check_host(wheel: Wheel) -> None:
    """Raise HostError if this machine cannot run what is in the wheel."""
    machine = platform.machine()
    if not sys.platform.startswith("linux") or machine not in ("x86_64", "AMD64"):
        raise HostError(
            f"rkllm-toolkit runs only on Linux on x86-64 ({wheel.platform}); this is {sys.platform} on {machine}.",
            hint="Convert on a PC (WSL or a virtual machine will do); the board needs only librkllmrt.so.",
        )
    if not re.fullmatch(r"(many)?linux\w*_x86_64(\.(many)?linux\w*_x86_64)*", wheel.platform):
        raise HostError(
            f"{wheel.path.name} is for {wheel.platform}, but this machine is linux_x86_64.",
            hint="Use the wheel that ends in linux_x86_64.whl.",
        )
    if platform.libc_ver()[0] != "glibc":
        raise HostError(
            "This system's C library is not glibc, and torch, which the toolkit needs, has wheels for glibc only.",
            hint="Use Debian, Ubuntu or Fedora, or a container of one of these, instead of Alpine.",
        )
