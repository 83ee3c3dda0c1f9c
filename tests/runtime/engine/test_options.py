"""Where the library comes from, and what --temperature and its kin stand for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from tests.runtime.conftest import with_file

from rkruntime.abi import RELEASES
from rkruntime.bundle.manifest import Bundle
from rkruntime.checks.preflight import ModelFacts
from rkruntime.cli import options
from rkruntime.engine import open as opening
from rkruntime.engine.generation import GREEDY, Sampling
from rkruntime.engine.loading import LoadOptions, checked
from rkruntime.engine.open import RuntimeOptions, SamplingOptions, default_sampling, find_library, ignored_settings
from rkruntime.errors import BundleError, HostError, LibraryError


def test_options_arrive_as_two_values() -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @options.sampling_options
    @options.runtime_options
    def command(sampling: SamplingOptions, runtime: RuntimeOptions) -> None:
        seen.update(sampling=sampling, runtime=runtime)

    arguments = (
        "--temperature 0.5 --top-k 3 --max-new-tokens 7 --library /x/librkllmrt.so --release 1.3.0 --max-context 64"
    )
    assert CliRunner().invoke(command, arguments.split()).exit_code == 0
    assert seen["sampling"] == SamplingOptions(0.5, 3, None, None, 7)
    assert seen["runtime"] == RuntimeOptions(Path("/x/librkllmrt.so"), "1.3.0", 64)
    for wrong in (
        "--temperature nan",
        "--top-p nan",
        "--repeat-penalty nan",
        "--temperature -1",
        "--top-k 0",
        "--top-p -0.1",
        "--top-p 1.1",
        "--max-new-tokens 0",
        "--max-context 8",
    ):
        assert CliRunner().invoke(command, wrong.split()).exit_code == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Sampling()),
        ({}, Sampling()),
        ({"do_sample": False, "temperature": 0.3}, GREEDY),
        ({"temperature": 0.3, "top_k": 5, "top_p": 0.5}, Sampling(0.3, 5, 0.5)),
        ({"temperature": None, "top_k": None, "do_sample": None}, Sampling()),
        ({"repetition_penalty": 1.3, "top_k": 7.0}, Sampling(top_k=7, repeat_penalty=1.3)),
        ({"do_sample": False, "repetition_penalty": 1.3, "temperature": 0.5}, replace(GREEDY, repeat_penalty=1.3)),
        ({"do_sample": True, "temperature": 0, "repetition_penalty": 1.3}, replace(GREEDY, repeat_penalty=1.3)),
        ({"top_k": 0}, Sampling()),
    ],
)
def test_a_bundle_has_its_own_sampling(fake_bundle: Bundle, config: Any, expected: Sampling) -> None:
    content = None if config is None else json.dumps(config)
    assert default_sampling(with_file(fake_bundle, "generation_config.json", content)) == expected


@pytest.mark.parametrize("value", ["1e400", "-1", "9" * 4000, "NaN", "-Infinity", "1e300", '"5"', "true", "[1]", "{}"])
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "repetition_penalty", "do_sample"])
def test_sampling_that_no_model_has_is_refused(fake_bundle: Bundle, name: str, value: str) -> None:
    if (name, value) == ("do_sample", "true"):
        return
    changed = with_file(fake_bundle, "generation_config.json", f'{{"{name}": {value}}}')
    with pytest.raises(BundleError, match=rf"generation_config\.json: {name}"):
        default_sampling(changed)


def test_what_rkllm_cannot_do_is_named(fake_bundle: Bundle) -> None:
    config = {"min_p": 0.1, "num_beams": 4, "suppress_tokens": [5], "top_k": 0, "typical_p": 1.0, "eta_cutoff": 0.0}
    changed = with_file(fake_bundle, "generation_config.json", json.dumps({**config, "penalty_alpha": None}))
    assert ignored_settings(changed) == ["min_p", "num_beams", "suppress_tokens", "top_k"]
    assert default_sampling(changed) == Sampling()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"eos_token_id": 1}, []),
        ({"eos_token_id": [1, 107]}, []),
        ({"eos_token_id": 106}, ["eos_token_id"]),
        ({"eos_token_id": [1, 106]}, ["eos_token_id"]),
        ({"eos_token_id": "x"}, ["eos_token_id"]),
        ({"eos_token_id": [[]]}, ["eos_token_id"]),
        ({"max_length": 8192}, ["max_length"]),
        ({"max_time": 2.0}, ["max_time"]),
        ({"top_h": 0.4, "encoder_no_repeat_ngram_size": 2}, ["encoder_no_repeat_ngram_size", "top_h"]),
        ({"max_length": None, "eos_token_id": None}, []),
    ],
)
def test_what_ends_an_answer_in_transformers_alone_is_named(fake_bundle: Bundle, config: Any, named: list[str]) -> None:
    """The fake bundle's answers end with tokens 1 and 107."""
    assert ignored_settings(with_file(fake_bundle, "generation_config.json", json.dumps(config))) == named


def test_transformers_own_defaults_are_not_named(fake_bundle: Bundle) -> None:
    from transformers import GenerationConfig

    content = GenerationConfig().to_json_string(use_diff=False)
    changed = with_file(fake_bundle, "generation_config.json", content)
    assert ignored_settings(changed) == []


def test_sampling_that_the_manifest_does_not_list_is_not_read(fake_bundle: Bundle) -> None:
    without = with_file(fake_bundle, "generation_config.json", None)
    (fake_bundle.path / "generation_config.json").write_text('{"temperature": 9}')
    assert default_sampling(without) == Sampling()


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_broken_generation_config_is_said_to_be(fake_bundle: Bundle, content: str) -> None:
    with pytest.raises(BundleError, match=r"generation_config\.json"):
        default_sampling(with_file(fake_bundle, "generation_config.json", content))
    (fake_bundle.path / "generation_config.json").write_text("{}")
    with pytest.raises(BundleError, match="SHA-256"):
        default_sampling(fake_bundle)


def test_options_go_over_the_bundles_sampling() -> None:
    assert SamplingOptions().over(GREEDY) == GREEDY
    assert SamplingOptions(temperature=0).over(Sampling()) == GREEDY
    assert SamplingOptions(temperature=0.7).over(GREEDY) == Sampling(temperature=0.7)
    assert SamplingOptions(top_k=3).over(Sampling(temperature=0.2)) == Sampling(temperature=0.2, top_k=3)


@pytest.fixture
def board_bundle(fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    monkeypatch.setattr(opening, "SEARCHED", (str(tmp_path / "usr/lib"), str(tmp_path / "usr/local/lib")))
    return replace(fake_bundle, manifest=replace(fake_bundle.manifest, target="toolkit"))


def test_a_board_has_its_library_in_known_places(
    board_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(LibraryError, match="usr/local/lib"):
        find_library(board_bundle, RuntimeOptions())
    for place in ("usr/local/lib", "usr/lib", "mine"):
        library = tmp_path / place / "librkllmrt.so"
        library.parent.mkdir(parents=True)
        library.write_bytes(b"")
        monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path / 'mine'}")
        assert find_library(board_bundle, RuntimeOptions()) == library
    assert find_library(board_bundle, RuntimeOptions(library=Path("/given.so"))) == Path("/given.so")


def test_the_emulator_is_asked_for_by_name(fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def build(release: str, progress: Any, stop: Any) -> Path:
        asked.append(release)
        progress("building")
        return Path("/built.so")

    monkeypatch.setattr(opening.importlib, "import_module", lambda name: SimpleNamespace(build=build))
    assert find_library(fake_bundle, RuntimeOptions()) == Path("/built.so")
    find_library(fake_bundle, RuntimeOptions(release="1.3.0"))
    assert asked == ["1.2.3", "1.3.0"]


def test_without_the_boards_tools_there_is_no_emulator(fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rkboard.emulator.build", None)
    with pytest.raises(HostError, match=r"rkboard\.emulator") as caught:
        find_library(fake_bundle, RuntimeOptions())
    assert caught.value.hint.endswith("pip install --force-reinstall FOLDER")


@pytest.mark.parametrize("base", [Sampling(), GREEDY, Sampling(temperature=0.3, repeat_penalty=1.5)])
@pytest.mark.parametrize("zero", ["temperature", "top_p"])
def test_zero_is_greedy_and_keeps_the_penalties_that_were_asked_for(base: Sampling, zero: str) -> None:
    """One rule for the command line and the daemon: what is not choosing among several tokens stays."""
    plain = Sampling(temperature=0.0, top_k=1, top_p=1.0, repeat_penalty=1.0)
    assert base.changed({zero: 0}) == plain
    assert base.changed({zero: 0, "top_k": 50}) == plain
    wanted = {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -1.0}
    assert base.changed({zero: 0, **wanted}) == replace(plain, **wanted)
    if zero == "temperature":
        assert SamplingOptions(temperature=0, repeat_penalty=1.3).over(base) == replace(plain, repeat_penalty=1.3)


@pytest.mark.parametrize(
    ("release", "asked", "flash"),
    [
        ("1.1.4", None, None),
        ("1.2.0", None, True),
        ("1.3.1", None, True),
        ("1.2.3", False, False),
        ("1.1.0", True, True),
    ],
)
def test_the_embedding_table_stays_in_the_file_where_the_release_can(
    release: str, asked: bool | None, flash: bool | None
) -> None:
    """As `rkedge plan` counts on it; what the library's own default is has not been published."""
    known = ModelFacts(platform="rk3588", toolkit=release, npu_cores=3, max_context=512, size=1 << 20)
    given = LoadOptions(Path("librkllmrt.so"), Path("model"), known=known, embed_flash=asked)
    identity: Any = SimpleNamespace(release=RELEASES[release], emulated=True, notice="")
    assert checked(given, identity)[0].embed_flash is flash
    assert checked(replace(given, known=None), identity)[0].embed_flash is asked


def test_the_memory_domain_reaches_the_load(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoadOptions] = []

    def load(options: LoadOptions, **_: Any) -> Any:
        seen.append(options)
        raise LibraryError("enough")

    monkeypatch.setattr("rkruntime.engine.engine.Engine.load", load)
    for domain in (None, 3):
        options = RuntimeOptions(base_domain_id=domain)
        with pytest.raises(LibraryError, match="enough"):
            opening.load_engine(bundle, options, SamplingOptions(), lambda finding: None)
    assert [each.params("1.2.3")["extend_param"]["base_domain_id"] for each in seen] == [None, 3]
