"""`rkedge convert --target toolkit` from checkpoint to bundle, with stand-ins of the toolkit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.converter.held_room import ROOM, held

from rkconvert.adapters.merged_model import AdapterSource
from rkconvert.conversion.convert import Options, convert
from rkconvert.output import bundle_folder
from rkconvert.output.host_memory import HostMemory
from rkconvert.toolkit import result, target
from rkconvert.toolkit.result import ToolkitResult
from rkruntime.bundle.manifest import open_bundle
from rkruntime.bundle.rkllm_file import read_rkllm
from rkruntime.errors import (
    AdapterError,
    CalibrationError,
    HostError,
    InputError,
    OutputError,
    RefusedError,
    RKEdgeError,
    ToolkitError,
    UsageError,
)

Make = Callable[..., Path]
PROMPT = "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def base(make_model: Make) -> Path:
    """A model wide enough for the toolkit, and the size of the file that the stand-in makes of it."""
    folder = make_model(head_dim=64, query_pre_attn_scalar=64)
    change(folder, standin_weights=2_000_000)
    return folder


@pytest.fixture
def options(base: Path, tmp_path: Path, environments: Callable[[str], Path]) -> Callable[..., Options]:
    """A conversion that works; `options(version, field=value)`."""
    (tmp_path / "bundles").mkdir()

    def make(version: str = "1.2.3", **fields: Any) -> Options:
        return Options(
            **{
                "checkpoint": str(base),
                "output": tmp_path / "bundles" / "bundle",
                "target": "toolkit",
                "toolkit_python": environments(version),
                "force_dtype": True,  # nothing was ever published about models this small
                **fields,
            }
        )

    return make


def left(options: Options) -> list[str]:
    return os.listdir(options.output.parent)


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def is_complete(folder: Path) -> bool:
    """What the toolkit's part of a bundle is, and nothing that was there for the work only."""
    found = contents(folder)
    wanted = {"model.rkllm", "rkedge.yaml", "tokenizer.json", "report/toolkit.json", "report/toolkit.log"}
    return wanted <= set(found) and not any(part.startswith(".") for name in found for part in Path(name).parts)


@pytest.mark.parametrize("version", ["1.1.4", "1.2.0", "1.2.3", "1.3.0"])
def test_a_bundle(options: Callable[..., Options], version: str, tmp_path: Path, home: Path) -> None:
    asked = options(version)
    bundle = convert(asked)
    assert left(asked) == ["bundle"]
    assert is_complete(bundle.path)
    bundle.verify(trust_stamps=False)
    manifest = bundle.manifest
    assert (manifest.model_file, manifest.target, manifest.dtype) == ("model.rkllm", "toolkit", "w8a8")
    assert manifest.toolkit_version == f"{version}+standin"
    assert any("without calibration data" in note for note in manifest.notes)
    assert read_rkllm(bundle.model).toolkit_version == version
    report = json.loads((bundle.path / "report" / "toolkit.json").read_text())
    assert [call["stage"] for call in report["calls"]] == ["load", "build", "export"]
    assert report["file"]["size"] == bundle.model.stat().st_size
    # Where things were on this machine is nobody's business.
    for path in bundle.path.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
    assert not list((home / "xdg_cache_home" / "rkedge" / "logs").glob("*"))


def test_no_path_of_this_machine_is_in_a_bundle(
    options: Callable[..., Options], fail: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home of somebody"
    (home / "tmp files").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp files"))
    monkeypatch.setenv("TMPDIR", str(home / "tmp files"))
    fail("build:paths")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"input": PROMPT, "target": "a"}] * 20))
    bundle = convert(options(calibration=data))
    private = {*tmp_path.parts, "somebody", "tmp files", *Path(__file__).parts[:-4], "site-packages"} - {"/", "tmp"}
    for path in (file for file in bundle.path.rglob("*") if file.is_file() and file.parent.name == "report"):
        text = path.read_bytes().decode("utf-8", "replace")
        assert not [name for name in private if f"/{name}" in text or f"{name}/" in text], path
    log = (bundle.path / "report" / "toolkit.log").read_text()
    assert ".../rkllm_standin.py:13: and/or 3/4 </s> https://github.com/airockchip/rknn-llm/issues" in log
    assert ".../calibration.json" in log


@pytest.mark.parametrize("name", ["data.json", "chats [v2]/{a,b} ::*.json"])
def test_calibration_is_used_and_named_by_its_hash(options: Callable[..., Options], tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"input": PROMPT, "target": "a"}] * 20))
    bundle = convert(options(calibration=path))
    report = json.loads((bundle.path / "report" / "toolkit.json").read_text())
    assert report["calls"][1]["arguments"]["dataset"] == "calibration.json"
    assert len(report["calibration"]["sha256"]) == 64
    assert not any("without calibration data" in note for note in bundle.manifest.notes)
    assert "Generating train split: 20 examples" in (bundle.path / "report" / "toolkit.log").read_text()


def test_parameters_that_an_algorithm_found_are_kept(options: Callable[..., Options]) -> None:
    asked = {"platform": "rk3576", "dtype": "w4a16", "algorithm": "grq", "toolkit_device": "cuda"}
    bundle = convert(options(**asked))
    assert (bundle.path / "report" / "toolkit.qparams").read_text() == "scales"
    bundle.verify(trust_stamps=False)
    convert(options(**asked, output=bundle.path.with_name("again"), qparams=bundle.path / "report" / "toolkit.qparams"))


def test_a_log_that_others_deleted_does_not_cost_the_model(
    options: Callable[..., Options], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_back(*given: Any) -> ToolkitResult:
        shutil.rmtree(home / "xdg_cache_home")
        return result.read_back(*given)

    monkeypatch.setattr(target, "read_back", read_back)
    asked = {"platform": "rk3576", "dtype": "w4a16", "algorithm": "grq", "toolkit_device": "cuda"}
    bundle = convert(options(**asked))
    assert is_complete(bundle.path)
    assert "Model has been saved" in (bundle.path / "report" / "toolkit.log").read_text()
    assert (bundle.path / "report" / "toolkit.qparams").read_text() == "scales"


def test_an_adapter_merged(options: Callable[..., Options], base: Path, make_adapter: Make) -> None:
    bundle = convert(options(loras=(AdapterSource(str(make_adapter(base))),)))
    assert is_complete(bundle.path)
    assert [adapter.name for adapter in bundle.manifest.adapters] == ["lora"]


def test_an_adapter_of_its_own(options: Callable[..., Options], base: Path, make_adapter: Make) -> None:
    adapter = make_adapter(base)
    bundle = convert(options(loras=(AdapterSource(str(adapter)),), lora_mode="runtime"))
    assert is_complete(bundle.path)
    assert read_rkllm(bundle.path / "model_lora.rkllm").toolkit_version == "1.2.3"
    assert [item.name for item in bundle.manifest.adapters] == ["lora"]
    assert any("model_lora.rkllm" in note for note in bundle.manifest.notes)
    assert any("without its adapter" in note for note in bundle.manifest.notes)
    report = json.loads((bundle.path / "report" / "toolkit.json").read_text())
    assert report["calls"][0]["arguments"]["model_lora"] == "lora"


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"dtype": "w4a16"}, RefusedError, "4-bit"),
        ({"version": "1.1.4", "max_context": 8192}, UsageError, "max-context"),
        ({"release": "1.3.0"}, UsageError, r"the toolkit is 1\.2\.3"),
        ({"algorithm": "gdq"}, RefusedError, "for w4a16"),
        ({"calibration": Path("none.json")}, CalibrationError, "No such file"),
        ({"npu_cores": 4}, UsageError, "has 3"),
        ({"lora_mode": "runtime"}, UsageError, "no adapter is given"),
        ({"lora_mode": "runtime", "loras": (AdapterSource("a"), AdapterSource("b"))}, UsageError, "but 2 are given"),
        (
            {"lora_mode": "runtime", "loras": (AdapterSource("a", 0.5),)},
            UsageError,
            "a=0.5: rkedge loads .* with weight 1",
        ),
        ({"lora_mode": "other"}, UsageError, "no LoRA mode"),
        ({"dtype": "w8a8_g512"}, RefusedError, "multiples of 512"),
    ],
)
def test_refused_before_anything_starts(
    options: Callable[..., Options], monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any], error: type[RKEdgeError], words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(target, "run_toolkit", None)
    asked = options(**fields)
    with pytest.raises(error, match=words) as caught:
        convert(asked)
    assert caught.value.hint
    assert left(asked) == []


def test_too_narrow(options: Callable[..., Options], make_model: Make) -> None:
    asked = options(checkpoint=str(make_model("narrow")))
    with pytest.raises(RefusedError, match="keys have 32 dimensions"):
        convert(asked)


@pytest.mark.parametrize(
    ("version", "load_dtype", "fits", "helps"),
    [
        ("1.1.4", "bfloat16", False, False),
        ("1.2.3", "float32", False, True),
        ("1.2.3", "bfloat16", True, False),
        ("1.3.0", "float32", False, False),
        ("1.3.0", "bfloat16", False, False),
    ],
)
def test_memory_for_half_of_the_weights_as_float32(
    options: Callable[..., Options], base: Path, monkeypatch: pytest.MonkeyPatch,
    version: str, load_dtype: str, fits: bool, helps: bool,
) -> None:  # fmt: skip
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))  # bfloat16
    monkeypatch.setattr(target, "read_memory", lambda: HostMemory(3 * size // 2, 0, 0))
    asked = options(version, toolkit_load_dtype=load_dtype)
    if fits:
        convert(asked)
        return
    with pytest.raises(HostError, match="as float32 alone") as caught:
        convert(asked)
    assert ("bfloat16" in caught.value.hint) is helps


def test_no_toolkit_here(options: Callable[..., Options]) -> None:
    asked = replace(options(), toolkit_python=None)
    with pytest.raises(HostError, match="none is set up"):
        convert(asked)
    assert left(asked) == []


def test_an_adapter_that_a_lora_file_cannot_say(
    options: Callable[..., Options], base: Path, make_adapter: Make
) -> None:
    asked = options(loras=(AdapterSource(str(make_adapter(base, use_dora=True))),), lora_mode="runtime")
    with pytest.raises(AdapterError, match="all that an RKLLM LoRA file"):
        convert(asked)


def test_an_adapter_with_pickles_reaches_the_toolkit_without(
    options: Callable[..., Options], base: Path, make_adapter: Make
) -> None:
    adapter = make_adapter(base)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    bundle = convert(options(loras=(AdapterSource(str(adapter)),), lora_mode="runtime"))
    assert (bundle.path / "model_lora.rkllm").is_file()


@pytest.mark.parametrize("fault", ["build:killed", "export:return", "write:nothing"])
def test_a_failure_leaves_nothing(options: Callable[..., Options], fail: Callable[[str], None], fault: str) -> None:
    fail(fault)
    asked = options()
    with pytest.raises((HostError, ToolkitError)) as caught:
        convert(asked)
    assert left(asked) == []
    assert Path(caught.value.details["log"]).is_file()
    fail("")
    convert(asked).verify(trust_stamps=False)


def test_what_the_toolkit_has_finished_is_not_done_again(
    options: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bundle_folder, "write_manifest", interrupt)
        convert(asked)
    assert not asked.output.exists()
    monkeypatch.setattr(target, "run_toolkit", None)
    bundle = convert(asked)
    assert is_complete(bundle.path)
    bundle.verify(trust_stamps=False)
    assert left(asked) == ["bundle"]


def test_room_for_the_report_is_held_while_the_toolkit_works(
    options: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            seen.append((name, held() >= ROOM))
            return real(*args, **more)

        return call

    monkeypatch.setattr(target, "run_toolkit", look("toolkit", target.run_toolkit))
    monkeypatch.setattr(target.report, "write", look("report", target.report.write))
    convert(options())
    assert seen == [("toolkit", True), ("report", False)]


@pytest.mark.long
def test_a_disk_that_fills_up_after_hours_of_work(
    options: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(verify=True)
    real = {name: getattr(Path, name) for name in ("write_text", "write_bytes")}
    writes, ends = 0, []

    def convert_until(failing: int) -> None:
        """A conversion with a full disk at that write into the bundle, counted from the toolkit's end."""

        def full(name: str) -> Callable[..., int]:
            def write(path: Path, data: Any, *rest: Any, **more: Any) -> int:
                nonlocal writes
                if (
                    asked.output.parent in path.parents
                    and (path.parents[0] / "model.rkllm").exists() | (path.parents[1] / "model.rkllm").exists()
                ):
                    writes += 1
                    if writes == failing:
                        real[name](path, data[: len(data) // 2], *rest, **more)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return int(real[name](path, data, *rest, **more))

            return write

        nonlocal writes
        writes = 0
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, full(name))
            convert(asked)

    for failing in range(1, 30):
        try:
            convert_until(failing)
            ends.append("made")
            text = json.loads((asked.output / "report" / "toolkit.json").read_text())
            if failing == 1:
                assert "its log is not whole: No space left on device" in text["warnings"]
        except HostError as error:
            assert "disk is full" in error.message
            ends.append("kept" if "kept in" in error.hint else "lost")
        if ends[-1] == "kept":
            with monkeypatch.context() as patch:
                patch.setattr(target, "run_toolkit", None)
                convert(asked).verify(trust_stamps=False)
        if asked.output.exists():
            shutil.rmtree(asked.output)
        assert left(asked) == []
        if writes < failing:
            break
    # Without its log the model is made; from then on it is kept, and the report has its room.
    assert ends[0] == "made"
    assert set(ends[1:-1]) == {"kept"}
    assert len(ends) > 7


@pytest.mark.parametrize(
    ("name", "lora_mode"),
    [("model.rkllm", "merge"), ("model_lora.rkllm", "merge"), ("model_lora.rkllm", "runtime"), ("report/more", "merge"),
     ("report/toolkit.log", "merge")],
)  # fmt: skip
def test_nothing_foreign_gets_from_an_unfinished_folder_into_the_bundle(
    options: Callable[..., Options], base: Path, make_adapter: Make, monkeypatch: pytest.MonkeyPatch, name: str,
    lora_mode: str,
) -> None:  # fmt: skip
    asked = options(loras=(AdapterSource(str(make_adapter(base))),), lora_mode=lora_mode)
    expected = contents(convert(replace(asked, output=asked.output.with_name("other"))).path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bundle_folder, "write_manifest", interrupt)
        convert(asked)
    planted = asked.output.with_name(".bundle.partial") / name
    planted.parent.mkdir(exist_ok=True)
    # A file that looks like the real one from outside: its size, beginning and end.
    data = bytearray(planted.read_bytes() if planted.is_file() else b"foreign " * 100)
    data[len(data) // 2] ^= 1
    planted.write_bytes(data)
    bundle = convert(asked)
    bundle.verify(trust_stamps=False)
    assert contents(bundle.path) == expected
    assert bytes(data) not in [path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(path: Path) -> None:
    """Other weights, with size and time of change as before."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


# Each gets the checkpoint, the adapter and the calibration file.
EDITS: dict[str, Callable[[Path, Path, Path], object]] = {
    "nothing": lambda base, lora, texts: None,
    "config": lambda base, lora, texts: edit(base / "config.json", rms_norm_eps=1e-5),
    "generation": lambda base, lora, texts: edit(base / "generation_config.json", eos_token_id=[1]),
    "tokenizer": lambda base, lora, texts: edit(base / "tokenizer.json"),
    "tokenizer's settings": lambda base, lora, texts: edit(base / "tokenizer_config.json", model_max_length=77),
    "template": lambda base, lora, texts: (base / "chat_template.jinja").write_text(
        (base / "chat_template.jinja").read_text().replace("trim", "trim | trim")
    ),
    "calibration": lambda base, lora, texts: texts.write_text(texts.read_text().replace('"a"', '"b"')),
    "alpha": lambda base, lora, texts: edit(lora / "adapter_config.json", lora_alpha=77),
    "adapter": lambda base, lora, texts: rewrite(lora / "adapter_model.safetensors"),
    "weights": lambda base, lora, texts: rewrite(sorted(base.glob("*.safetensors"))[0]),
}


@pytest.mark.parametrize(
    ("change", "lora_mode"), [*((change, "merge") for change in EDITS), ("alpha", "runtime"), ("adapter", "runtime")]
)
def test_a_finished_file_is_kept_only_if_it_would_be_the_same(
    options: Callable[..., Options], base: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: str, lora_mode: str,
) -> None:  # fmt: skip
    texts, lora, runs = tmp_path / "data.json", make_adapter(base), []
    texts.write_text(json.dumps([{"input": PROMPT, "target": "a"}] * 20))
    asked = options(loras=(AdapterSource(str(lora)),), calibration=texts, lora_mode=lora_mode)
    real = target.run_toolkit

    def run_toolkit(*arguments: Any, **others: Any) -> Any:
        runs.append(arguments)
        return real(*arguments, **others)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "run_toolkit", run_toolkit)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bundle_folder, "write_manifest", interrupt)
        convert(asked)
    EDITS[change](base, lora, texts)
    convert(asked).verify(trust_stamps=False)
    assert len(runs) == (1 if change == "nothing" else 2)


@pytest.mark.parametrize("which", ["data.json", "base/tokenizer.json", "lora/adapter_config.json", "base/config.json"])
def test_a_source_that_changes_while_the_toolkit_works(
    options: Callable[..., Options], base: Path, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:  # fmt: skip
    texts = tmp_path / "data.json"
    texts.write_text(json.dumps([{"input": PROMPT, "target": "a"}] * 20))
    asked = options(loras=(AdapterSource(str(make_adapter(base))),), calibration=texts)
    real = target.run_toolkit

    def run_toolkit(*arguments: Any, **others: Any) -> Any:
        path = tmp_path / which
        path.write_bytes(path.read_bytes() + b" ")
        return real(*arguments, **others)

    monkeypatch.setattr(target, "run_toolkit", run_toolkit)
    with pytest.raises(InputError, match=f"{Path(which).name} changed while it was read"):
        convert(asked)
    assert left(asked) == []


def test_paths_that_are_not_utf8(
    options: Callable[..., Options], base: Path, make_adapter: Make, tmp_path: Path
) -> None:
    odd, lora = tmp_path / os.fsdecode(b"base\xff"), make_adapter(base)
    base.rename(odd)
    lora = lora.rename(tmp_path / os.fsdecode(b"lora\xe9"))
    bundle = convert(options(checkpoint=str(odd), loras=(AdapterSource(str(lora)),)))
    assert (bundle.manifest.source.name, bundle.manifest.adapters[0].name) == (r"base\xff", r"lora\xe9")
    bundle.verify(trust_stamps=False)
    # Its own libraries take no such path.
    for fields in ({"output": tmp_path / os.fsdecode(b"out\xff")}, {"calibration": tmp_path / os.fsdecode(b"\xff")}):
        with pytest.raises(UsageError, match=r"not UTF-8"):
            convert(options(**{"output": tmp_path / "bundles" / "other", "checkpoint": str(odd), **fields}))


def rkedge(options: Options, **environment: str) -> subprocess.Popen[bytes]:
    assert options.toolkit_python is not None
    arguments = [
        "convert", options.checkpoint, "--target", "toolkit", "--force-dtype", "-o", str(options.output),
        "--toolkit-python", str(options.toolkit_python),
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "rkruntime.cli", *arguments], stderr=subprocess.PIPE, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_in_the_middle_and_a_second_run(options: Callable[..., Options], ending: signal.Signals) -> None:
    asked = options()
    with rkedge(asked, RKLLM_STANDIN_FAULT="build:hang") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b"quantizing" in line:
                break
        process.send_signal(ending)
        process.stderr.read()
    assert process.returncode == (130 if ending == signal.SIGINT else -ending)
    assert not asked.output.exists()
    with rkedge(asked) as process:
        assert process.stderr is not None
        text = process.stderr.read().decode()
    assert process.returncode == 0, text
    assert "toolkit: quantizing" in text
    assert left(asked) == ["bundle"]
    assert is_complete(asked.output)
    with pytest.raises(OutputError):
        convert(asked)


def test_the_command_names_the_bundle_after_the_release(
    base: Path, environments: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from rkconvert.commands.convert import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RKEDGE_TOOLKIT_PYTHON", str(environments("1.3.0")))
    done = CliRunner().invoke(
        run, [str(base), "--target", "toolkit", "--force-dtype", "--json", "-q"], catch_exceptions=False
    )
    manifest = json.loads(done.stdout)
    assert manifest["name"] == "base-rk3588-w8a8-1.3.0+standin"
    open_bundle(tmp_path / manifest["name"]).verify(trust_stamps=False)
