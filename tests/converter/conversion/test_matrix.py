"""Matrices: which conversions there are, what became of each, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from rkconvert import demo
from rkconvert.commands.convert import run
from rkconvert.conversion import matrix
from rkconvert.sources.open import open_source
from rkconvert.tensors import hashes_ahead
from rkconvert.toolkit.options import ToolkitOptions
from rkruntime import cli
from rkruntime.bundle.manifest import open_bundle
from rkruntime.bundle.rkemu import Writer
from rkruntime.errors import BundleError, CheckpointError, UsageError
from rkruntime.files import sha256_file

REAL_OPEN, REAL_HASH = open_source, sha256_file


@pytest.fixture
def write(tmp_path):
    (tmp_path / "out").mkdir()

    def write(grid, **options) -> Path:
        path = tmp_path / "matrix.yaml"
        path.write_text(
            yaml.safe_dump({"checkpoint": str(demo.checkpoint()), "output": "out", **options, "matrix": grid})
        )
        return path

    return write


@pytest.fixture
def convert(capsys):
    """Exit code, the outcomes, and what was said on stderr."""

    def convert(path, *more):
        code = cli.main(["convert", "--matrix", str(path), "--json", *map(str, more)])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return convert


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_combinations_are_products_one_after_another():
    grids = [{"dtype": ["a", "b"], "lora": [[], ["x"]]}, {"dtype": ["c"]}]
    found = matrix.combinations(grids, UsageError)
    assert [(item["dtype"], item.get("lora")) for item in found] == [
        ("a", []), ("a", ["x"]), ("b", []), ("b", ["x"]), ("c", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (None, "matrix is NoneType; it must be a mapping"),
        ({}, "matrix is dict"),
        ([], "matrix is an empty list"),
        ([{}], "matrix is dict"),
        ({"force_dtype": [False, True]}, "are the same: force_dtype=False and force_dtype=True"),
        ({"quiet": [False, True]}, "varies quiet, which applies to all conversions"),
        ({"json": [True], "dtype": ["w8a8"]}, "varies json, which applies to all conversions"),
        ({"lora": [[str(demo.adapter())], [f"{demo.adapter()}=1"]]}, "are the same"),
        (["dtype"], "matrix is str"),
        ({"dtype": "w8a8"}, "matrix.dtype is str; it must be a list of values"),
        ({"dtype": []}, "matrix.dtype is list"),
        ({key: list(range(10)) for key in "abcd"}, "more than 1000 conversions"),
        ({"dtpye": ["w8a8"]}, r"unknown key dtpye \(did you mean dtype\?\)"),
        ({"dtype": ["w8a8", "w9a9"]}, "dtype is 'w9a9'; it must be one of"),
        ({"max_context": [64, 64]}, "Two conversions of the matrix are the same"),
    ],
)
def test_wrong_matrices(write, tmp_path, capsys, grid, message):
    assert cli.main(["convert", "--matrix", str(write(grid))]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert names(tmp_path / "out") == []


def test_types_and_adapters(write, convert, tmp_path):
    path = write(
        {"dtype": ["w8a8", "fp32"], "lora": [[], [str(demo.adapter())], [f"{demo.adapter()}=0.5"]]}, max_context=64
    )
    code, outcomes, _ = convert(path)
    assert code == 0
    assert [item["status"] for item in outcomes] == ["made"] * 6
    assert len(names(tmp_path / "out")) == 6
    made = [open_bundle(Path(item["output"])) for item in outcomes]
    for bundle in made:
        bundle.verify(trust_stamps=False)
        assert bundle.manifest.max_context == 64
    assert [bundle.manifest.dtype for bundle in made] == ["w8a8"] * 3 + ["fp32"] * 3
    assert [bundle.manifest.options["loras"] for bundle in made[:3]] == [[], ["pirate=1"], ["pirate=0.5"]]
    assert outcomes[2]["cell"] == "dtype=w8a8 lora=pirate=0.5"


def test_the_keys_of_the_whole_run_are_obeyed(write, tmp_path, capsys):
    path = write({"max_context": [64]}, quiet=True, json=True)
    assert cli.main(["convert", "--matrix", str(path)]) == 0
    said = capsys.readouterr()
    assert ([item["status"] for item in json.loads(said.out)], said.err) == (["made"], "")
    # An error is shown as the file asks, too, and a key that says no is not a yes.
    assert cli.main(["convert", "--matrix", str(write({"max_context": [64, 64]}, json=True))]) == 2
    assert "are the same" in json.loads(capsys.readouterr().out)["message"]
    assert cli.main(["convert", "--matrix", str(write({"dtype": ["fp32"]}, quiet=False, json=False))]) == 0
    said = capsys.readouterr()
    assert "1 of 1" in said.err
    assert not said.out.startswith("[")


def test_a_cell_is_what_the_command_alone_makes(write, convert, tmp_path):
    convert(write({"lora": [[str(demo.adapter())]], "max_context": [64]}))
    [name] = names(tmp_path / "out")
    alone = tmp_path / "alone" / name
    alone.parent.mkdir()
    line = ["convert", demo.checkpoint(), "--lora", demo.adapter(), "--max-context", 64, "-o", alone, "-q"]
    assert cli.main(list(map(str, line))) == 0
    first, second = open_bundle(tmp_path / "out" / name).manifest, open_bundle(alone).manifest
    # The report tells how long it took.
    changing = {"report/convert.json"}
    assert {key: first.files[key] for key in first.files.keys() - changing} == {
        key: second.files[key] for key in second.files.keys() - changing
    }
    assert first.options == second.options


def test_the_model_is_opened_and_hashed_once(write, convert, monkeypatch):
    opened, hashed = [], []
    module = "rkconvert.conversion.opened"
    monkeypatch.setattr(f"{module}.open_source", lambda *args: opened.append(args) or REAL_OPEN(*args))
    monkeypatch.setattr(hashes_ahead, "sha256_file", lambda *args: hashed.append(args[0]) or REAL_HASH(*args))
    code, _, _ = convert(write({"dtype": ["w8a8", "fp32"], "max_context": [64, 128]}))
    assert code == 0
    assert len(opened) == 1
    sources = [path for path in hashed if demo.checkpoint() in path.parents]
    assert len(sources) == len(set(sources)) == 3
    assert len(hashed) == len(set(hashed)) == 3 + 4  # and the model file of each cell


def test_refused_cells_are_told_before_work_begins(write, convert, tmp_path):
    code, outcomes, said = convert(write({"dtype": ["w8a8", "w4a16", "w8a8_g128"]}))
    assert code == 4
    assert [item["status"] for item in outcomes] == ["made", "refused", "refused"]
    assert said.index(
        "dtype=w4a16: refused: w4a16 on rk3588: no toolkit release up to 1.3.0 supports a 4-bit type"
    ) < said.index("1 of 3")
    assert len(names(tmp_path / "out")) == 1


def test_a_release_that_nothing_runs_is_told_before_work_begins(write, convert):
    code, outcomes, said = convert(write({"release": ["1.2.3", "1.3.1", "../x"]}))
    assert code == 2
    assert [item["status"] for item in outcomes] == ["made", "failed", "failed"]
    assert said.index("The emulator has no release '../x'") < said.index("1 of 3")


def test_a_failure_does_not_keep_the_others_back(write, convert, tmp_path, monkeypatch):
    rows = Writer.write_rows

    def breaks(self, name, first, array):
        if array.ndim == 2 and array.dtype == np.float32 and not name.endswith(".scale"):
            raise OSError(28, "No space left on device")
        rows(self, name, first, array)

    monkeypatch.setattr(Writer, "write_rows", breaks)
    grid = [
        {"checkpoint": [str(tmp_path / "none"), str(demo.checkpoint())]},
        {"dtype": ["fp32", "w8a8"], "max_context": [96]},
    ]
    code, outcomes, said = convert(write(grid))
    assert [item["status"] for item in outcomes] == ["failed", "made", "failed", "made"]
    assert code == CheckpointError.exit_code
    assert "There is no folder" in outcomes[0]["message"]
    assert "disk is full" in outcomes[2]["message"]
    assert "disk is full" in said
    assert len(names(tmp_path / "out")) == 2


def test_a_second_run_keeps_what_is_there(write, convert, tmp_path):
    convert(write({"dtype": ["w8a8"]}))
    [name] = names(tmp_path / "out")
    before = (tmp_path / "out" / name / "rkedge.yaml").stat().st_mtime_ns
    code, outcomes, _ = convert(write({"dtype": ["w8a8", "fp32"]}))
    assert (code, [item["status"] for item in outcomes]) == (0, ["there", "made"])
    assert (tmp_path / "out" / name / "rkedge.yaml").stat().st_mtime_ns == before


def test_a_bundle_of_other_options_is_not_taken_for_done(write, convert, tmp_path):
    convert(write({"dtype": ["w8a8"]}))
    code, [outcome], _ = convert(write({"dtype": ["w8a8"]}, max_context=64))
    assert (code, outcome["status"]) == (3, "failed")
    assert "already exists" in outcome["message"]


def test_a_bundle_is_done_whatever_does_not_change_it(write, convert):
    convert(write({"dtype": ["w8a8"], "force_dtype": [False]}))
    code, [outcome], _ = convert(write({"dtype": ["w8a8"], "force_dtype": [True]}))
    assert (code, outcome["status"]) == (0, "there")


@pytest.mark.parametrize("other", [{"max_context": [4096]}, {"npu_cores": [3]}, {"release": ["1.2.3"]}])
def test_defaults_written_out_are_the_same_conversion(write, capsys, tmp_path, other):
    assert cli.main(["convert", "--matrix", str(write([{"dtype": ["w8a8"]}, other]))]) == 2
    assert "Two conversions of the matrix are the same" in capsys.readouterr().err
    assert not names(tmp_path / "out")


def test_a_damaged_bundle_is_not_taken_for_done(write, convert, tmp_path):
    _, [outcome], _ = convert(write({"dtype": ["w8a8"]}))
    os.truncate(Path(outcome["output"]) / "model.rkemu", 1000)
    code, [outcome], _ = convert(write({"dtype": ["w8a8"]}))
    assert (code, outcome["status"]) == (BundleError.exit_code, "failed")


def test_the_command_line_wins_over_the_file(write, convert):
    path = write({"dtype": ["w8a8", "fp32"]}, max_context=64)
    _, outcomes, _ = convert(path, "--max-context", 128)
    assert {open_bundle(Path(item["output"])).manifest.max_context for item in outcomes} == {128}


def test_the_command_line_and_the_matrix_contradict(write, capsys):
    assert cli.main(["convert", "--matrix", str(write({"dtype": ["w8a8"]})), "--dtype", "fp32"]) == 2
    assert "varies dtype, which is also set on the command line" in capsys.readouterr().err


def test_a_recipe_beneath_a_matrix(write, convert, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_context: 96\ndtype: fp32\n")
    _, [outcome], _ = convert(write({"dtype": ["w8a8"]}), "--recipe", recipe)
    manifest = open_bundle(Path(outcome["output"])).manifest
    assert (manifest.max_context, manifest.dtype) == (96, "w8a8")


def test_the_table(write, capsys):
    assert cli.main(["convert", "--matrix", str(write({"dtype": ["w8a8", "w4a16"]})), "-q"]) == 4
    said = capsys.readouterr().out
    for word in ("dtype=w8a8", "made", "dtype=w4a16", "refused"):
        assert word in said


def digest(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("convert.json", "rkedge.yaml")
    }


def kills(tmp_path, path, rounds):
    """Kill a matrix at random moments; every bundle that is there is whole, and the last run makes all of them."""
    command = [sys.executable, "-c", "import sys; from rkruntime.cli import main; sys.exit(main(sys.argv[1:]))"]
    command += ["convert", "--matrix", str(path), "-q", "--json"]
    out = tmp_path / "out"
    began = time.monotonic()
    assert subprocess.run(command, capture_output=True).returncode == 0
    seconds, whole = time.monotonic() - began, digest(out)
    seen = set()
    for at in range(rounds):
        for folder in out.iterdir():
            subprocess.run(["rm", "-rf", str(folder)], check=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.Random(at).uniform(0.3, 1.0) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in out.iterdir():
            if not folder.name.startswith("."):
                open_bundle(folder).verify(trust_stamps=False)
        seen.add(len([folder for folder in out.iterdir() if not folder.name.startswith(".")]))
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert digest(out) == whole
    return seen


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_kills_at_random_moments(write, tmp_path):
    path = write({"dtype": ["w8a8", "fp32"], "lora": [[], [str(demo.adapter())]], "max_context": [64, 128]})
    assert len(kills(tmp_path, path, 30)) > 2


# A value other than the default for each option that only the toolkit can be asked for.
TOOLKIT_ONLY = {
    "toolkit_python": "/usr/bin/python3", "calibration": "data.json", "algorithm": "grq", "optimization_level": 0,
    "hybrid_rate": 0.5, "qparams": "a.qparams", "toolkit_device": "cuda", "toolkit_load_dtype": "float16",
    "toolkit_patience": 5.0, "verify": True,
}  # fmt: skip


def test_every_option_of_the_toolkit_is_known_here():
    assert len(TOOLKIT_ONLY) == len(dataclasses.fields(ToolkitOptions))
    assert {f"--{key.replace('_', '-')}" for key in TOOLKIT_ONLY} <= {name for item in run.params for name in item.opts}


@pytest.mark.parametrize("key", TOOLKIT_ONLY)
@pytest.mark.parametrize("how", ["line", "recipe", "matrix"])
def test_an_option_that_the_emulator_cannot_follow_is_refused(write, convert, capsys, tmp_path, how, key):
    option, value = f"--{key.replace('_', '-')}", TOOLKIT_ONLY[key]
    line = ["convert", str(demo.checkpoint()), "-q", "-o", str(tmp_path / "out" / "bundle")]
    if how == "matrix":
        code, outcomes, _ = convert(write({key: [value]}))
        said = outcomes[0]["message"]
    else:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({key: value}))
        given = option if value is True else f"{option}={value}"
        more = ["--recipe", str(tmp_path / "recipe.yaml")] if how == "recipe" else [given]
        code, said = cli.main([*line, *more]), capsys.readouterr().err
    assert code == 2
    assert f"{option}: only the vendor's toolkit can do that" in said
    assert names(tmp_path / "out") == []


def test_the_folder_of_a_matrix_is_made_and_goes_if_it_stays_empty(write, convert, tmp_path):
    assert convert(write({"dtype": ["w4a16"]}, output="new"))[0] == 4
    assert convert(write({"dtype": ["w8a8"]}, output="none/new"))[0] == 3
    assert names(tmp_path) == ["matrix.yaml", "out"]
    assert convert(write({"dtype": ["w8a8"]}, output="new"))[0] == 0
    assert len(names(tmp_path / "new")) == 1
    (tmp_path / "file").write_text("")
    assert convert(write({"dtype": ["w8a8"]}, output="file"))[0] == 3


def test_the_matrix_of_the_documentation_runs_as_it_is_written(tmp_path, convert):
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    text = page.partition("## Matrix\n\n")[2].partition("\n\n")[0]
    (tmp_path / "many.yaml").write_text(textwrap.dedent(text))
    for name in ("gemma-2-2b-it", "gemma-2-9b-it"):
        (tmp_path / name).symlink_to(demo.checkpoint())
    for name in ("pirate", "polite"):
        (tmp_path / name).symlink_to(demo.adapter())
    code, outcomes, _ = convert(tmp_path / "many.yaml")
    assert (code, [item["status"] for item in outcomes]) == (0, ["made"] * 7)
    assert len(names(tmp_path / "bundles")) == 7
