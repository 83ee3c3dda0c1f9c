"""All kernels, and both machines, give the same bits."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkboard.emulator import build as emulator
from rkruntime.bundle.rkemu import Writer, read_container

LOGITS = 2
KERNELS = {"x86_64": ["plain", "avx2", "avx512vnni"], "aarch64": ["plain", "neon-dotprod", "neon-i8mm"]}
AARCH64_CPUS = {
    "cortex-a53": ["plain"],
    "cortex-a76": ["plain", "neon-dotprod"],
    "max": ["plain", "neon-dotprod", "neon-i8mm"],
}
# Sizes that are no multiples of any vector, and group sizes that are not either.
SHAPES: dict[str, dict[str, Any]] = {
    "even": {},
    "odd": {"head_dim": 26, "hidden_size": 76, "intermediate_size": 141, "vocab_size": 331},
    "groups": {"hidden_size": 104, "intermediate_size": 168, "head_dim": 30, "groups": 4},
    "floats": {"dtype": "FP32", "hidden_size": 76},
    "long": {"head_dim": 80, "sliding_window": 45, "num_attention_heads": 6},  # several tiles and blocks of attention
}


def logits(load: Any, path: Path, prompt: list[int], kernels: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the prompt and of 8 tokens, or None if this machine has no such kernels."""
    monkeypatch.setenv("RKEMU_KERNELS", kernels)
    try:
        client = load(path)
    except AssertionError:
        return None
    assert client.run(prompt, mode=LOGITS) == 0
    return np.concatenate([batch[0].logits for batch in client.events[:-1]])


def extreme(path: Path, source: Path) -> None:
    """The same model with weights at the ends of int8, -128 among them, and scales to match."""
    made = read_container(source)
    rng = np.random.default_rng(5)
    specs = [entry.spec for entry in made.tensors.values()]
    with Writer(path, made.metadata, specs) as writer:
        for spec in specs:
            array = made.read(spec.name)
            if spec.dtype == "int8":
                array = rng.choice(np.array([-128, 127], np.int8), spec.shape)
            writer.write(spec.name, array)


@pytest.mark.parametrize("kernels", KERNELS[emulator.host_arch()][1:])
@pytest.mark.parametrize("shape", [*SHAPES, "extreme"])
def test_all_kernels_give_the_same_bits(
    shape: str,
    kernels: str,
    make_model: Any,
    load: Any,
    prompt: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = make_model(tmp_path / "m.rkemu", tie_word_embeddings=False, **SHAPES.get(shape, {}))
    path = made.path
    if shape == "extreme":
        path = tmp_path / "extreme.rkemu"
        extreme(path, made.path)
    if shape == "long":
        prompt = prompt * 4
    got = logits(load, path, prompt, kernels, monkeypatch)
    if got is None:
        assert f"RKEMU_KERNELS={kernels} is not one of" in capfd.readouterr().err
        pytest.skip(f"this processor has no {kernels}")
    expected = logits(load, path, prompt, "plain", monkeypatch)
    assert len(expected) == len(prompt) + 7
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("flags", [[], ["-mfma"]] if emulator.host_arch() == "x86_64" else [[]])
def test_products_are_added_with_one_rounding(flags: list[str], tmp_path: Path) -> None:
    """Two million times, held against fmaf of the standard library; without flags it is computed in doubles."""
    here = Path(__file__)
    program = tmp_path / "fused"
    command = [*emulator.find_compiler().command, "-std=c++17", "-O2", "-ffp-contract=off", *flags]
    include = f"-I{here.parents[2] / 'board/emulator'}"
    subprocess.run([*command, include, here.with_name("fused.cc"), "-o", program], check=True, capture_output=True)
    if flags and " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no such instructions")
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout) == (0, "")


def compile_driver(arch: str, folder: Path) -> Path:
    """driver.cc for a machine, beside the library that it finds by its own folder."""
    library = emulator.build("1.2.3", arch=arch, warnings_are_errors=True)
    source = Path(__file__).parent / "driver.cc"
    program = folder / f"driver-{arch}"
    command = [
        *emulator.find_compiler(arch).command,
        "-std=c++17",
        "-O1",
        f"-I{library.parent}",
    ]
    subprocess.run(
        [*command, source, library, f"-Wl,-rpath,{library.parent}", "-o", program], check=True, capture_output=True
    )
    return program


def run(command: list[str | Path], kernels: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RKEMU_KERNELS": kernels}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)


@pytest.mark.arm64
@pytest.mark.parametrize("shape", ["even", "odd", "groups"])
@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is one already")
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs g++-aarch64-linux-gnu")
@pytest.mark.skipif(not shutil.which("qemu-aarch64-static"), reason="needs qemu-user-static")
def test_aarch64_gives_the_same_bits(shape: str, make_model: Any, prompt: list[int], tmp_path: Path) -> None:
    """Each processor with the best that it has; what it does not have is refused."""
    made = make_model(tmp_path / "m.rkemu", tie_word_embeddings=False, **SHAPES[shape])
    arguments = [made.path, *map(str, prompt[:-1])]  # an odd number: tiles of all sizes
    here = run([compile_driver(emulator.host_arch(), tmp_path), *arguments], "plain")
    assert here.returncode == 0, here.stderr
    assert len(here.stdout.splitlines()[0].split()) == 24
    driver = compile_driver("aarch64", tmp_path)
    for cpu, known in AARCH64_CPUS.items():
        command = ["qemu-aarch64-static", "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", driver, *arguments]
        there = run(command, "")
        assert f", {known[-1]} kernels," in there.stderr
        assert (there.returncode, there.stdout) == (0, here.stdout), cpu
        for kernels in set(KERNELS["aarch64"]) - set(known):
            refused = run(command, kernels)
            assert refused.returncode == 1
            assert f"RKEMU_KERNELS={kernels} is not one of {', '.join(known)}" in refused.stderr
