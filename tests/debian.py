"""Debian in a folder, made by mmdebstrap once and kept."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rkboard.emulator import build as emulator


def codename() -> str:
    """This machine's release."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return release.get("VERSION_CODENAME", "bookworm").strip('"')


@functools.cache
def debian(name: str, *options: str) -> Path:
    """The tree that mmdebstrap makes with these options. Skips the test if it cannot, but not in CI."""
    made_by = hashlib.sha256(repr(options).encode()).hexdigest()[:8]  # other packages are another tree
    folder = emulator.cache_folder().parent / "tests" / f"{name}-{codename()}-{made_by}"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        command = ["mmdebstrap", "--mode=root", "--quiet", *options, codename(), partial]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0 and "CI" not in os.environ:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"mmdebstrap could not make the root: {made.stderr.strip().splitlines()[-1:]}")
        assert made.returncode == 0, made.stderr
        partial.rename(folder)
    return folder
