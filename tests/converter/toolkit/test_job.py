"""The table of releases, and the calls that a release is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from rkconvert.rules import releases as versions
from rkconvert.rules.releases import LOADED_BYTES
from rkconvert.toolkit.job import ToolkitJob, calls
from rkconvert.toolkit.options import ToolkitOptions
from rkruntime.abi import CALLABLE
from rkruntime.errors import HostError, RefusedError, UsageError

RELEASES = CALLABLE
# Issue 126 of airockchip/rknn-llm quotes this signature of 1.1.x from the installed package.
BUILD_1_1 = {
    "do_quantization", "optimization_level", "quantized_dtype", "quantized_algorithm", "target_platform",
    "num_npu_core", "extra_qparams", "dataset", "hybrid_rate",
}  # fmt: skip


def arguments(job: ToolkitJob, version: str) -> dict[str, dict[str, Any]]:
    made = calls(job, versions.release(version), Path("/scratch/model.rkllm"))
    return {step["method"]: dict(step["arguments"]) for step in made.steps}


def test_every_release_with_load_types_has_all_of_them() -> None:
    assert {versions.release(version).load_dtypes for version in RELEASES} == {(), tuple(LOADED_BYTES)}


def test_each_thing_that_a_generation_names_has_a_source() -> None:
    for row in versions.table()["generations"]:
        assert set(row) - {"from", "sources"} == set(row["sources"])
        assert all(row["sources"].values())


@pytest.mark.parametrize("version", RELEASES)
def test_the_calls_have_the_arguments_of_the_release(job: Callable[..., ToolkitJob], version: str) -> None:
    found = arguments(job(), version)
    new = version >= "1.2.0"
    assert set(found["build"]) == BUILD_1_1 | ({"max_context"} if new else set())
    assert set(found["load_huggingface"]) == {"model", "model_lora", "device"} | (
        {"dtype", "custom_config", "load_weight"} if new else set()
    )
    assert set(found["export_rkllm"]) == {"export_path"} | (
        {"export_tokenizer", "export_embedding"} if version >= "1.3" else set()
    )
    assert found["build"]["quantized_dtype"] == "w8a8"
    assert found["export_rkllm"]["export_path"] == "/scratch/model.rkllm"


def test_values_arrive(job: Callable[..., ToolkitJob], tmp_path: Path) -> None:
    asked = job(
        calibration=tmp_path / "data.json", lora=tmp_path / "lora", max_context=8192, npu_cores=2, hybrid_rate=0.25,
        optimization_level=0, dtype="w8a8_g128", toolkit_load_dtype="bfloat16",
    )  # fmt: skip
    found = arguments(asked, "1.2.3")
    assert found["build"] == {
        "do_quantization": True, "optimization_level": 0, "quantized_dtype": "w8a8_g128",
        "quantized_algorithm": "normal", "target_platform": "rk3588", "num_npu_core": 2, "extra_qparams": None,
        "dataset": str(tmp_path / "data.json"), "hybrid_rate": 0.25, "max_context": 8192,
    }  # fmt: skip
    assert found["load_huggingface"]["model_lora"] == str(tmp_path / "lora")
    assert found["load_huggingface"]["dtype"] == "bfloat16"


def test_the_files_that_the_toolkit_reads_are_known(job: Callable[..., ToolkitJob], tmp_path: Path) -> None:
    paths = {item.name: tmp_path / item.name for item in fields(ToolkitOptions) if "Path" in str(item.type)}
    asked = job(**paths)
    given = {value for values in arguments(asked, "1.2.3").values() for value in values.values()}
    assert {str(path) for path in asked.files.values()} == given & {str(path) for path in paths.values()}
    assert len(asked.files) == 2


def test_no_type_means_no_quantization(job: Callable[..., ToolkitJob]) -> None:
    assert arguments(job(dtype="fp16"), "1.3.0")["build"]["do_quantization"] is False


# platform -> types by release, from the manuals (facts of chapter build()).
RK3588 = ["w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"]
RK3576 = ["w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w8a8"]
RK3562 = ["w8a8", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w4a8_g32"]
ALL_TYPES = sorted({*RK3588, *RK3576, *RK3562})


@pytest.mark.parametrize("version", RELEASES)
def test_types_of_every_platform_and_release(job: Callable[..., ToolkitJob], version: str) -> None:
    allowed = {"rk3588": RK3588, "rk3576": RK3576}
    if version >= "1.2.0":
        allowed["rk3562"] = RK3562
    if version >= "1.2.2":
        allowed["rv1126b"] = RK3576
    for platform in ("rk3588", "rk3576", "rk3562", "rv1126b", "rk3566"):
        for dtype in ALL_TYPES:
            asked = job(platform=platform, dtype=dtype, npu_cores=1)
            if dtype in allowed.get(platform, ()):
                assert arguments(asked, version)["build"]["quantized_dtype"] == dtype
            else:
                with pytest.raises(RefusedError, match=platform) as caught:
                    arguments(asked, version)
                assert caught.value.hint


@pytest.mark.parametrize(("platform", "most"), [("rk3588", 3), ("rk3576", 2), ("rk3562", 1), ("rv1126b", 1)])
def test_cores(job: Callable[..., ToolkitJob], platform: str, most: int) -> None:
    for cores in range(5):
        asked = job(platform=platform, npu_cores=cores)
        if 1 <= cores <= most:
            assert arguments(asked, "1.3.0")["build"]["num_npu_core"] == cores
        else:
            with pytest.raises(RefusedError, match=f"has {most}"):
                arguments(asked, "1.3.0")


ON_RK3576: dict[str, Any] = {"platform": "rk3576", "npu_cores": 2}


@pytest.mark.parametrize(
    ("version", "algorithm", "fields", "error", "words"),
    [
        ("1.1.4", "grq", {}, RefusedError, "has no algorithm 'grq'"),
        ("1.2.0", "normal_r8", {}, RefusedError, "has no algorithm"),
        ("1.3.0", "gdq", {}, RefusedError, "has no algorithm 'gdq'"),
        ("1.2.3", "gdq", {}, RefusedError, "for w4a16"),
        ("1.2.3", "grq", {"platform": "rk3576", "dtype": "w4a16", "npu_cores": 2}, RefusedError, "CUDA"),
        ("1.2.3", "normal_r65", {}, UsageError, "from 1 to 64"),
        ("1.2.3", "normal_r0", {}, UsageError, "from 1 to 64"),
        ("1.2.3", "normal_r8", {"lora": Path("lora")}, RefusedError, "makes its own LoRA file"),
        ("1.2.3", "normal_x", {}, RefusedError, "has no algorithm"),
        ("1.2.3", "normal", {"hybrid_rate": 1.0}, UsageError, "below 1"),
        ("1.2.3", "normal", {"hybrid_rate": -0.1}, UsageError, "hybrid rate"),
        ("1.2.3", "normal", {"optimization_level": 2}, UsageError, "0 or 1"),
        ("1.2.3", "normal", {"toolkit_device": "npu"}, UsageError, "cpu or cuda"),
        ("1.2.3", "normal", {"toolkit_load_dtype": "int8"}, UsageError, "float32, float16, bfloat16"),
        ("1.1.4", "normal", {"toolkit_load_dtype": "int8"}, UsageError, "float32, float16, bfloat16"),
        ("1.2.3", "normal", {"max_context": 16416}, RefusedError, "16,384 at most"),
        ("1.1.4", "normal", {"max_context": 4128}, RefusedError, "4,096 at most"),
        ("1.2.3", "normal", {"max_context": 4000}, None, ""),
        ("1.2.3", "normal", {"max_context": 4001}, UsageError, "multiple of 32"),
        ("1.2.3", "normal", {"max_context": 0}, UsageError, "multiple of 32"),
        ("1.2.3", "grq_r64", {**ON_RK3576, "dtype": "w4a16", "toolkit_device": "cuda"}, None, ""),
        ("1.1.1", "gdq", {**ON_RK3576, "dtype": "w4a16_g32", "toolkit_device": "cuda"}, None, ""),
    ],
)  # fmt: skip
def test_what_a_release_does_not_do(
    job: Callable[..., ToolkitJob],
    version: str,
    algorithm: str,
    fields: dict[str, Any],
    error: type[Exception] | None,
    words: str,
) -> None:
    asked = replace(job(**fields), algorithm=algorithm)
    if error is None:
        assert arguments(asked, version)["build"]["quantized_algorithm"] == algorithm
    else:
        with pytest.raises(error, match=words):
            arguments(asked, version)


def notes(job: ToolkitJob, version: str) -> tuple[str, ...]:
    return calls(job, versions.release(version), Path("/scratch/model.rkllm")).notes


def test_what_is_done_otherwise_is_said(job: Callable[..., ToolkitJob]) -> None:
    assert notes(job(), "1.1.4") == notes(job(), "1.2.3") == notes(job(toolkit_load_dtype="bfloat16"), "1.2.3") == ()
    assert "allows 4,096" in notes(job(max_context=2048), "1.1.4")[0]
    assert "cannot be told" in notes(job(toolkit_load_dtype="bfloat16"), "1.1.4")[0]
    assert "saves no memory" in notes(job(toolkit_load_dtype="bfloat16"), "1.3.0")[0]
    assert notes(job(toolkit_load_dtype="bfloat16", toolkit_device="cuda"), "1.3.0") == ()


@pytest.mark.parametrize("version", ["1.2.3+standin", "1.2.3", "1.2.3.post1"])
def test_local_versions_are_the_release(version: str) -> None:
    assert versions.release(version).row == "1.2.3"


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("1.0.1", "not supported"),
        ("1.4.0", "newer than any"),
        ("2.0", "newer"),
        ("", "not a release"),
        ("abc", "not a release"),
    ],
)
def test_releases_that_are_not_used(version: str, words: str) -> None:
    with pytest.raises(HostError, match=words) as caught:
        versions.release(version)
    assert caught.value.hint


def test_the_refusal_names_the_release_that_can(job: Callable[..., ToolkitJob]) -> None:
    with pytest.raises(RefusedError) as caught:
        arguments(job(max_context=8192), "1.1.4")
    assert "1.2.0 and later" in caught.value.hint
    with pytest.raises(RefusedError) as caught:
        arguments(job(dtype="w4a16"), "1.3.0")
    assert caught.value.hint == "Use --dtype w8a8."


def test_the_document_is_one_line_of_ascii(job: Callable[..., ToolkitJob], tmp_path: Path) -> None:
    made = calls(job(calibration=tmp_path / "größe 数据\n.json"), versions.release("1.2.3"), Path("/x"))
    text = made.document()
    assert text.isascii()
    assert text.count("\n") == 1
    assert [call["stage"] for call in json.loads(text)["calls"]] == ["load", "build", "export"]


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [("algorithm", "grq", "--algorithm"), ("hybrid_rate", 0.5, "--hybrid-rate"),
     ("calibration", Path("data.json"), "--calibration"), ("qparams", Path("a.qparams"), "--qparams")],
)  # fmt: skip
@pytest.mark.parametrize("version", ["1.1.4", "1.3.0"])
def test_what_tells_a_quantizer_something_is_refused_without_one(job, field, value, option, version):
    with pytest.raises(UsageError, match=f"{option}: fp16 is not quantized"):
        calls(job(dtype="fp16", **{field: value}), versions.release(version), Path("out"))
    calls(job(dtype="fp16"), versions.release(version), Path("out"))
