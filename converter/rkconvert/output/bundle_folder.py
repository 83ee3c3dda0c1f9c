"""The files of a bundle around its model file: tokenizer, template, model card, report and, last, the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import yaml
from jinja2 import Environment

from rkconvert.model.chat_template import ChatTemplate
from rkconvert.model.tokenizer import tokenizer_bytes
from rkconvert.output.markdown import argument, plain
from rkconvert.sources.checkpoint import Checkpoint
from rkconvert.sources.hub import is_hub_id
from rkconvert.tensors.hashes_ahead import HashesAhead
from rkconvert.tensors.memory_folder import Place
from rkruntime.bundle.manifest import GENERATION_CONFIG, MANIFEST, TEMPLATE, TOKENIZER, FileRecord, Manifest
from rkruntime.files import atomic_file, sha256_file

CARD: Final = "README.md"
LORA_NOTE: Final = (
    "the adapter {name} is in {file} beside the model: rkedge loads both, other programs call rkllm_load_lora"
)
REPORT: Final = "report"
# Says, until a bundle is complete, that its model file is.
DONE: Final = ".done"
NOTICE: Final = "NOTICE"
LICENCE: Final = "Gemma Terms of Use, https://ai.google.dev/gemma/terms"
_TAGS: Final = {"toolkit": ("rkllm", "rockchip", "npu"), "emulator": ("rkedge", "emulator")}
# Section 3.1 of those terms requires this sentence in a file of this name.
_NOTICE: Final = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"


@dataclass(frozen=True)
class ModelFile:
    """A model file in a bundle's folder: its name, and notes for the manifest."""

    name: str
    notes: tuple[str, ...]


def created_by() -> str:
    """Return program and version, as in the manifest and the model card."""
    return f"rkedge {version('rkedge')}"


def write_side_files(folder: Path, checkpoint: Checkpoint, tokenizer: Place, template: ChatTemplate) -> None:
    """Write tokenizer.json (from the folder `tokenizer`), chat_template.jinja and generation_config.json."""
    (folder / TOKENIZER).write_bytes(tokenizer_bytes(tokenizer / TOKENIZER))
    (folder / TEMPLATE).write_text(template.source, encoding="utf-8")
    settings = {
        **checkpoint.generation_config,
        "bos_token_id": checkpoint.config.bos_token_id,
        "eos_token_id": list(checkpoint.eos_token_ids),
    }
    _write_json(folder / GENERATION_CONFIG, settings)


def write_report(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON document to report/."""
    (folder / REPORT).mkdir(exist_ok=True)
    _write_json(report_path(folder, name), content)


def report_path(folder: Path, name: str) -> Path:
    """Where a document of report/ is."""
    return folder / REPORT / f"{name}.json"


def read_report(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON document from report/; empty if it is missing or unreadable."""
    try:
        report = json.loads(report_path(folder, name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def write_manifest(folder: Path, manifest: Manifest, ahead: HashesAhead) -> Manifest:
    """Write the model card, the notice and, last, rkedge.yaml with every other file's hash; returns the manifest.

    Args:
        ahead: Hashes of files, each begun when the file was finished.
    """
    (folder / CARD).write_text(model_card(manifest), encoding="utf-8")
    (folder / NOTICE).write_text(_NOTICE, encoding="utf-8")
    files = {
        path.relative_to(folder).as_posix(): FileRecord(
            path.stat().st_size, ahead.of(path) if path in ahead else sha256_file(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DONE
    }
    complete = replace(manifest, files=files)
    (folder / MANIFEST).write_text(complete.to_yaml(), encoding="utf-8")
    return complete


def model_card(manifest: Manifest) -> str:
    """Return README.md in the form of model hubs: front matter, then the text."""
    # The hub links to these, so names of folders must not appear here.
    bases = [item.name for item in (manifest.source, *manifest.adapters) if is_hub_id(item.name)]
    front = {
        **({"base_model": bases, "base_model_relation": "quantized"} if bases else {}),
        "license": "gemma",
        "library_name": "rkllm" if manifest.target == "toolkit" else "rkedge",
        "tags": [*_TAGS[manifest.target], manifest.platform, manifest.dtype, manifest.family],
        "pipeline_tag": "text-generation",
    }
    text = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=False, keep_trailing_newline=True)  # noqa: S701 - Markdown, see `plain`
    environment.filters |= {"plain": plain, "argument": argument}
    body = environment.from_string(text).render(asdict(manifest))
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A document as report/ has it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as partial:  # a report that cannot be completed stays as it was
        partial.write_bytes(json_bytes(content))
