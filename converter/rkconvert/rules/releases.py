"""Capabilities of each rkllm-toolkit release, from the table in versions.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from rkruntime.checks.types import types_by_soc
from rkruntime.errors import HostError
from rkruntime.versions import Version
from rkruntime.versions import version as parse

# Bytes per weight in the toolkit's memory, by the data type of loaded weights.
LOADED_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
_REPOSITORY: Final = "https://github.com/airockchip/rknn-llm"
_MANUAL: Final = re.compile(r"\b(EN|CN) (\d\.\d\.\d) p\.([\d-]+)")
_FILE: Final = re.compile(r"([\w./-]+\.(?:md|txt)) @ (\d\.\d\.\d)")
# Commits with manuals that were published after the tag of their release.
_LATER: Final = {"1.1.4": "29a9fb97d14c773b6efa07415dce6ec91c7d8461"}
_TABLE: Final = Path(__file__).with_name("versions.yaml")


@dataclass(frozen=True)
class ToolkitRelease:
    """One release of the toolkit.

    Attributes:
        version: As installed; `row` is the generation of the table that it belongs to.
        python: Python releases with an installable wheel.
        arguments: Names of arguments that the release accepts, by method.
        dtypes: Quantized types by SoC, in lower case.
        cores: NPU cores by SoC.
        gpu_algorithms: Algorithms that need CUDA and are only for 4-bit types.
        low_rank: Whether `normal_rN` and the like exist.
        context: At most `most` tokens per file, in steps of `step`.
        load_dtypes: Values of load_huggingface's dtype; empty if it has none.
        half_on_cpu: Whether 16-bit load types work on the CPU.
        transformers: Major release of transformers that it pins, or empty.
        sources: Source of each field.
    """

    version: str
    row: str
    python: tuple[str, ...]
    arguments: Mapping[str, tuple[str, ...]]
    dtypes: Mapping[str, tuple[str, ...]]
    cores: Mapping[str, int]
    algorithms: tuple[str, ...]
    gpu_algorithms: tuple[str, ...]
    low_rank: bool
    context: Mapping[str, int]
    load_dtypes: tuple[str, ...]
    half_on_cpu: bool
    several_eos: bool
    template_file: bool
    transformers: str
    sources: Mapping[str, str]

    def takes(self, method: str, argument: str) -> bool:
        """Whether a method has an argument of that name."""
        return argument in self.arguments[method]

    def loads_half(self, device: str) -> bool:
        """Whether weights take 16 bits in memory if that is asked for, on `cpu` or `cuda`."""
        return bool(self.load_dtypes) and (self.half_on_cpu or device != "cpu")

    def loaded_as(self, device: str, asked: str) -> str:
        """Return the data type of weights in memory, a key of LOADED_BYTES; `asked` if the release obeys that."""
        return asked if self.loads_half(device) else "float32"

    def half_hint(self, device: str, asked: str) -> str:
        """Return the end of a hint on memory: how to load in 16 bits; empty if that is impossible or already done."""
        useful = self.loads_half(device) and LOADED_BYTES[asked] > LOADED_BYTES["bfloat16"]
        return ", or load the weights in 16 bits: --toolkit-load-dtype bfloat16" if useful else ""

    def source(self, key: str) -> str:
        """Return the source of a field, for messages."""
        return self.sources[key]


def addresses(source: str) -> str:
    """Return a source of versions.yaml or types.yaml with the addresses of its manuals, files and issues."""

    def manual(match: re.Match[str]) -> str:
        language, version, pages = match.groups()
        place = _LATER.get(version, f"release-v{version}")
        return f"{_REPOSITORY}/blob/{place}/doc/Rockchip_RKLLM_SDK_{language}_{version}.pdf (p.{pages})"

    text = _FILE.sub(rf"{_REPOSITORY}/blob/release-v\2/\1", _MANUAL.sub(manual, source))
    return re.sub(r"\bissue (\d+)", rf"{_REPOSITORY}/issues/\1", text)


@cache
def table() -> Mapping[str, Any]:
    """Return versions.yaml, unchanged."""
    content: dict[str, Any] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return content


@cache
def release(version: str) -> ToolkitRelease:
    """Return the row for an installed version such as `1.2.3`, `1.2.1b1` or `1.3.1`.

    Raises:
        HostError: The release cannot be used, or the table does not describe it yet.
    """
    try:
        key = parse(version)
    except ValueError:
        raise HostError(
            f"The toolkit's version reads {version!r}, which is not a release.",
            hint="Install the vendor's wheel again: `rkedge toolkit setup --wheel FILE`.",
        ) from None
    for row in table()["refused"]:
        if key < parse(row["below"]):
            raise HostError(
                f"rkllm-toolkit {version} is not supported: {row['reason']} ({row['source']}).",
                hint="Install 1.2.3 or 1.3.0: `rkedge toolkit setup --wheel FILE`.",
            )
    last = parse(table()["last_known"])
    if key.release[: len(last.release)] > last.release:
        raise HostError(
            f"rkllm-toolkit {version} is newer than any that RKEdge knows; the last is {table()['last_known']}.x.",
            hint="Install 1.3.0, or describe the release in rkconvert/rules/versions.yaml.",
        )
    return _generation(version, key)


def _generation(version: str, key: Version) -> ToolkitRelease:
    fields: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for row in table()["generations"]:
        if parse(row["from"]) > key:
            break
        for name in row["sources"]:
            value = _frozen(row[name])
            fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
        sources |= row["sources"]
        fields["row"] = row["from"]
    dtypes, source = types_by_soc(key)
    return ToolkitRelease(version=version, dtypes=dtypes, sources={**sources, "dtypes": source}, **fields)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value
