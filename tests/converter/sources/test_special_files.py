"""FIFOs and devices in place of a model's files: refused or left alone, never waited for or read without end."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from rkconvert import demo

# In a process of its own: a blocked open cannot be interrupted by a test.
_OPEN_ALL = textwrap.dedent(
    """
    import os, shutil, sys
    from pathlib import Path
    from rkconvert.adapters.chat import read_chat
    from rkconvert.adapters.merged_model import AdapterSource, merged_model
    from rkconvert.rules.releases import release
    from rkconvert.sources.gguf_file import read_gguf
    from rkconvert.sources.open import open_source
    from rkconvert.toolkit.checks import _pointers
    from rkconvert.toolkit.staging import stage
    from rkconvert.toolkit.wheel import read_wheel
    from rkruntime.errors import RKEdgeError

    work, kind = Path(sys.argv[1]), sys.argv[2]

    def replace(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")

    def use(base, adapter):
        try:
            model = merged_model(open_source(str(base)), [AdapterSource(str(adapter))])
            _, template = read_chat(model)
            for files in model.inputs:
                files.identity()
            (work / "staged").mkdir()
            stage(model, template, release("1.2.3"), work / "staged", lambda _: None)
            return "used"
        except RKEdgeError as error:
            return error.message
        finally:
            shutil.rmtree(work / "staged", ignore_errors=True)

    base, adapter = work / "base", work / "adapter"
    (base / "additional_chat_templates").mkdir()
    more = [base / "additional_chat_templates" / "default.jinja", *(base / name for name in (
        "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "generation_config.json",
        "model.safetensors", "chat_template.json", "pytorch_model.bin"))]
    more += [adapter / name for name in ("adapter_model.bin", "tokenizer.json", "chat_template.jinja")]
    for path in [*sorted(base.iterdir()), *sorted(adapter.iterdir()), *more]:
        if path.is_dir():
            continue
        kept = path.read_bytes() if path.exists() else None
        replace(path)
        print(path.name, use(base, adapter), flush=True)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    only = work / "only"
    only.mkdir()
    shutil.copy(base / "config.json", only)
    wheel = "rkllm_toolkit-1.2.3-cp312-cp312-linux_x86_64.whl"
    for name in ("x.safetensors", "pytorch_model.bin", "model.gguf", wheel):
        replace(only / name)
        for call in (open_source, read_gguf, read_wheel):
            try:
                call(str(only) if call is open_source else only / name)
            except RKEdgeError as error:
                print(name, error.message, flush=True)
        (only / name).unlink()
    """
)


def run(tmp_path: Path, kind: str) -> str:
    shutil.copytree(demo.checkpoint(), tmp_path / "base", copy_function=shutil.copyfile)
    shutil.copytree(demo.adapter(), tmp_path / "adapter", copy_function=shutil.copyfile)
    command = [sys.executable, "-c", _OPEN_ALL, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, preexec_fn=_limit)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # /dev/zero read whole


def test_fifos(tmp_path: Path) -> None:
    said = run(tmp_path, "fifo")
    assert "default.jinja" in said
    assert "x.safetensors" in said
    assert said.count("not a regular file") >= 6


def test_devices_without_an_end(tmp_path: Path) -> None:
    assert run(tmp_path, "device").count("not a regular file") >= 6
