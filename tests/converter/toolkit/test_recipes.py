"""Recipes and matrices for a board, with stand-ins of the toolkit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rkruntime import cli
from rkruntime.bundle.manifest import open_bundle


@pytest.fixture
def base(make_model):
    folder = make_model(head_dim=64, query_pre_attn_scalar=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"standin_weights": 2_000_000}))
    return folder


def test_a_shipped_recipe_makes_a_board_file(base, environments, tmp_path):
    line = ["--toolkit-python", environments("1.3.0"), "--max-context", 512, "-o", tmp_path / "bundle", "-q"]
    assert cli.main(["convert", str(base), "--recipe", "gemma-2-2b-it", *map(str, line)]) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.target, manifest.dtype, manifest.npu_cores, manifest.max_context) == ("toolkit", "w8a8", 3, 512)
    assert manifest.model_file == "model.rkllm"
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "| compatible with RKLLM version | 1.3.0+standin, and later ones of 1.3; rknpu driver 0.9.8 |" in card
    assert "- rkllm\n" in card


def test_a_matrix_of_releases_types_and_adapters(base, make_adapter, environments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    path = tmp_path / "matrix.yaml"
    pythons = [str(environments(version)) for version in ("1.1.4", "1.2.3")]
    grid = {"toolkit_python": pythons, "lora": [[], [str(make_adapter(base))]], "dtype": ["w8a8", "w4a16"]}
    common = {"checkpoint": str(base), "target": "toolkit", "output": "out", "max_context": 512}
    path.write_text(yaml.safe_dump({**common, "matrix": grid}, sort_keys=False))
    assert cli.main(["convert", "--matrix", str(path), "-q", "--json"]) == 4
    outcomes = json.loads(capsys.readouterr().out)
    assert [item["status"] for item in outcomes] == ["made", "refused"] * 4
    made = [open_bundle(Path(item["output"])) for item in outcomes if item["status"] == "made"]
    assert [bundle.manifest.toolkit_version for bundle in made] == ["1.1.4+standin"] * 2 + ["1.2.3+standin"] * 2
    assert [len(bundle.manifest.adapters) for bundle in made] == [0, 1, 0, 1]
    for bundle in made:
        bundle.verify(trust_stamps=False)
    assert cli.main(["convert", "--matrix", str(path), "-q", "--json"]) == 4
    again = json.loads(capsys.readouterr().out)
    assert [item["status"] for item in again] == ["there", "refused"] * 4
