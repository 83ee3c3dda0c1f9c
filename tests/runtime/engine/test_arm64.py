"""The same on aarch64: the layouts as its Python makes them, and worker and library made for it, under qemu-user.

The parent is this machine's own Python, the worker an aarch64 one; pipes do not care.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.debian import debian

from rkboard.emulator import build as emulator
from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Finished, Request, Token
from rkruntime.errors import LibraryError, WorkerCrashedError, WorkerHungError

TOOLS = ("qemu-aarch64-static", "mmdebstrap", "aarch64-linux-gnu-g++")
missing = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.arm64,
    pytest.mark.timeout(900),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is one already"),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mmdebstrap makes the root as root"),
]


def root() -> Path:
    """A file tree with aarch64's Python: packages are unpacked and nothing of them is run."""
    return debian("arm64", "--arch=arm64", "--variant=extract", "--skip=check/qemu", "--include=python3,libstdc++6")


@pytest.fixture(scope="module")
def python() -> tuple[str, ...]:
    """The command of an aarch64 Python."""
    return ("qemu-aarch64-static", "-L", str(root()), str(root() / "usr/bin/python3"), "-I", "-S", "-B")


DESCRIBE = """
import ctypes, json, os, sys
sys.path.insert(0, sys.argv[1])
from rkruntime.abi import RELEASES, abi_of
from rkruntime.abi.declarations import UNNAMED
from rkruntime.abi.types import fields_of

def members(abi, name, version, prefix="", base=0):
    made = abi._aggregate(name)
    for field in fields_of(name, version):
        member = getattr(made, field.name or "_unnamed")
        if field.type in UNNAMED:
            inner = prefix + field.name + "." if field.name else prefix
            yield from members(abi, field.type, version, inner, base + member.offset)
        else:
            yield [prefix + field.name, base + member.offset, member.size]

def describe(version):
    abi = abi_of(version)
    return {
        name: [ctypes.sizeof(made), ctypes.alignment(made), list(members(abi, name, version))]
        for name, made in abi.structs.items() if name not in UNNAMED
    }

print(json.dumps({"machine": os.uname().machine, "layouts": {version: describe(version) for version in RELEASES}}))
"""


def measured(fields: list[dict[str, Any]], prefix: str = "") -> list[list[Any]]:
    found: list[list[Any]] = []
    for field in fields:
        if "members" in field:
            found += measured(field["members"], f"{prefix}{field['name']}." if field["name"] else prefix)
        else:
            found.append([prefix + field["name"], field["offset"], field["size"]])
    return found


def test_layouts(python: tuple[str, ...]) -> None:
    result = subprocess.run([*python, "-c", DESCRIBE, "runtime"], capture_output=True, text=True, check=True)
    answer = json.loads(result.stdout)
    assert answer["machine"] == "aarch64"
    for path in Path("tests/data/rkllm-abi").glob("*.json"):
        facts = json.loads(path.read_text())
        expected = {
            name.replace("MultiModel", "MultiModal"): [struct["size"], struct["align"], measured(struct["fields"])]
            for name, struct in facts["structs"].items()
        }
        for version in facts["versions"]:
            assert answer["layouts"][version] == expected, version


@pytest.fixture
def double_there(
    misbehaving: Callable[..., LoadOptions],
    double: Callable[..., Path],
    python: tuple[str, ...],
) -> Callable[..., LoadOptions]:
    """`misbehaving` with library and worker of aarch64."""

    def make(behaviour: str, release: str, **changes: Any) -> LoadOptions:
        library = double(release, "aarch64")
        return misbehaving(behaviour, release, library=library, interpreter=python, load_timeout=300.0, **changes)

    return make


def test_the_worker_on_every_layout(double_there: Callable[..., LoadOptions], release: str) -> None:
    with Engine.load(double_there("waiting", release)) as engine:
        assert engine.info.driver_version == "0.9.8"
        events = list(engine.generate(Request([1, 2, 3])))
        assert events[:-1] == [Token(100 + i, f"{100 + i} ".encode()) for i in range(10)]
        *tokens, finished = engine.generate(Request([1], stop_tokens=frozenset({104})))
        assert isinstance(finished, Finished)
        assert len(tokens) == 4


def test_crashes_and_hangs(double_there: Callable[..., LoadOptions]) -> None:
    with pytest.raises(WorkerCrashedError, match="SIGSEGV"):
        Engine.load(double_there("init-segv", "1.3.0"))
    with Engine.load(double_there("token-hang", "1.2.3", token_timeout=2.0)) as engine, pytest.raises(WorkerHungError):
        list(engine.generate(Request([1])))


def test_a_wrong_machine(misbehaving: Callable[..., LoadOptions], double: Callable[..., Path]) -> None:
    with pytest.raises(LibraryError, match=f"is for aarch64, but this machine is {platform.machine()}"):
        Engine.load(misbehaving("", library=double("1.2.3", "aarch64")))


@pytest.mark.parametrize("there", ["1.2.3", "1.3.0"])
def test_the_emulator_gives_the_same_answer(
    options: Callable[..., LoadOptions], python: tuple[str, ...], there: str
) -> None:
    """Worker, binding and library of aarch64, token for token."""
    request = Request([2, 106, 451, 364, 472, 474], max_new_tokens=12)
    library = emulator.build(there, arch="aarch64")
    with Engine.load(options(there)) as engine:
        expected = list(engine.generate(request))[:-1]
    changed = options(there, library=library, interpreter=python, load_timeout=600.0, token_timeout=300.0)
    with Engine.load(changed) as engine:
        *tokens, finished = engine.generate(request)
        assert tokens == expected
        assert finished.perf is not None
        assert engine.cache_sizes()[0] >= 6
