"""Jobs for the toolkit: checked against the installed release, and translated into that release's calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.rules.releases import LOADED_BYTES, ToolkitRelease, release
from rkconvert.rules.type_names import UNQUANTIZED, parse_type
from rkconvert.toolkit.options import DEVICES, ToolkitOptions
from rkruntime.abi import CALLABLE
from rkruntime.errors import RefusedError, UsageError

SCHEMA: Final = "rkedge-toolkit-job/2"
# Positions at a prompt's end whose logits are written: those of one position of Gemma are a megabyte.
LAST_ROWS: Final = 16
LOGITS: Final = "logits.f32"
_LOW_RANK: Final = re.compile(r"(?P<algorithm>[a-z]+)_r(?P<rank>\d{1,3})")
_MOST_RANK: Final = 64


@dataclass(frozen=True, kw_only=True)
class ToolkitJob(ToolkitOptions):
    """One conversion.

    Attributes:
        model: Folder in Hugging Face layout, with safetensors.
        output: .rkllm file to make; an adapter's file gets the suffix `_lora`.
        dtype: Quantized type, or `fp16` for none.
        max_context: Largest context of the file, in tokens.
        lora: Folder of one adapter that becomes a separate file, for rkllm_load_lora.
        parameters: Number of weights, 0 if unknown; memory and the file's size are judged by it.
        file_size: Expected size of the file in bytes, 0 if unknown.
        prompts: Token ids whose logits the toolkit computes once the file is written; empty for no logits.
    """

    model: Path
    output: Path
    platform: str
    dtype: str
    npu_cores: int
    max_context: int
    lora: Path | None = None
    parameters: int = 0
    file_size: int = 0
    prompts: tuple[tuple[int, ...], ...] = ()

    @property
    def least_size(self) -> int:
        """Lower bound on a complete file's size, in bytes: the weights in their type."""
        return self.parameters * parse_type(self.dtype).bits // 8

    @property
    def has_adapter_file(self) -> bool:
        """Whether a second file belongs to the result: the adapter, or what normal_r8 and its like split off."""
        return self.lora is not None or _LOW_RANK.fullmatch(self.algorithm) is not None


@dataclass(frozen=True)
class Calls:
    """The calls for one release, as the worker makes them, with notes for the user.

    Attributes:
        steps: A dict of `stage`, `method` and `arguments` for each call, in order.
        notes: Notes on what the release cannot do exactly as asked.
        logits: `prompts`, the `path` of a file for logits of their `last` positions; None for no such file.
    """

    steps: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    logits: Mapping[str, Any] | None = None

    def document(self) -> str:
        """Return the job as one line of JSON, which the worker reads."""
        return json.dumps({"schema": SCHEMA, "calls": self.steps, "logits": self.logits}, ensure_ascii=True) + "\n"


def calls(job: ToolkitJob, installed: ToolkitRelease, export_path: Path) -> Calls:
    """Return the calls that carry out `job` with the installed release.

    Raises:
        RefusedError: This release is documented not to support it.
        UsageError: No release accepts the value.
    """
    _check_values(job)
    _check_unquantized(job)
    _check_type(job, installed)
    _check_algorithm(job, installed)
    notes = [*_context_notes(job, installed), *_load_notes(job, installed)]
    values: dict[str, Any] = {
        **job.arguments,
        "model": str(job.model.resolve()),
        "model_lora": str(job.lora.resolve()) if job.lora else None,
        "custom_config": None,
        "load_weight": True,
        "do_quantization": job.dtype != UNQUANTIZED,
        "quantized_dtype": "w8a8" if job.dtype == UNQUANTIZED else job.dtype,
        "target_platform": job.platform,
        "num_npu_core": job.npu_cores,
        "max_context": job.max_context,
        "export_path": str(export_path),
        "export_tokenizer": True,
        "export_embedding": True,
    }
    steps = tuple(
        {
            "stage": stage,
            "method": method,
            "arguments": {name: values[name] for name in installed.arguments[method]},
        }
        for stage, method in (("load", "load_huggingface"), ("build", "build"), ("export", "export_rkllm"))
    )
    logits = {"prompts": job.prompts, "last": LAST_ROWS, "path": str(export_path.parent / LOGITS)}
    return Calls(steps, tuple(notes), logits if job.prompts else None)


def _check_values(job: ToolkitJob) -> None:
    device, load = job.toolkit_device, job.toolkit_load_dtype
    ranges = {
        "optimization level": (job.optimization_level, job.optimization_level in (0, 1), "0 or 1"),
        "hybrid rate": (job.hybrid_rate, 0 <= job.hybrid_rate < 1, "at least 0 and below 1"),
        "device": (device, device in DEVICES, " or ".join(DEVICES)),
        "load type": (load, load in LOADED_BYTES, "one of " + ", ".join(LOADED_BYTES)),
    }
    for name, (value, right, words) in ranges.items():
        if not right:
            raise UsageError(f"The {name} is {value}; it must be {words}.")


def _check_unquantized(job: ToolkitJob) -> None:
    """Refuse options that have no effect without quantization."""
    changed = {
        "algorithm": job.algorithm != "normal",
        "hybrid-rate": job.hybrid_rate != 0,
        "calibration": job.calibration is not None,
        "qparams": job.qparams is not None,
    }
    if job.dtype == UNQUANTIZED and any(changed.values()):
        names = " and ".join(f"--{name}" for name, differs in changed.items() if differs)
        raise UsageError(
            f"{names}: {UNQUANTIZED} is not quantized, so this would have no effect.",
            hint="Leave it out, or choose a quantized --dtype.",
        )


def _check_type(job: ToolkitJob, installed: ToolkitRelease) -> None:
    types = installed.dtypes.get(job.platform)
    if types is None:
        raise RefusedError(
            f"rkllm-toolkit {installed.version} makes no files for {job.platform}; it supports"
            f" {', '.join(installed.dtypes)} ({installed.source('dtypes')}).",
            hint=_first_with(lambda row: job.platform in row.dtypes),
        )
    if job.dtype != UNQUANTIZED and job.dtype not in types:
        raise RefusedError(
            f"rkllm-toolkit {installed.version} supports {', '.join(types)} for {job.platform}, but not {job.dtype}"
            f" ({installed.source('dtypes')}).",
            hint=_first_with(lambda row: job.dtype in row.dtypes.get(job.platform, ()), f"Use --dtype {types[0]}."),
        )
    most = installed.cores[job.platform]
    if not 1 <= job.npu_cores <= most:
        raise RefusedError(
            f"A file for {job.npu_cores} NPU cores was asked for, but the {job.platform} has {most}"
            f" ({installed.source('cores')}).",
            hint=f"Use --npu-cores {most}, or fewer.",
        )


def _first_with(has: Callable[[ToolkitRelease], bool], otherwise: str = "Choose another SoC.") -> str:
    """Hint at the first release that supports it, or at an alternative."""
    first = next((version for version in CALLABLE if has(release(version))), None)
    if first is None:
        return otherwise
    return f"rkllm-toolkit {first} and later do: `rkedge toolkit setup --wheel FILE`. Or: {otherwise}"


def _check_algorithm(job: ToolkitJob, installed: ToolkitRelease) -> None:
    match = _LOW_RANK.fullmatch(job.algorithm)
    algorithm = match["algorithm"] if match else job.algorithm
    if algorithm not in installed.algorithms or (match and not installed.low_rank):
        more = ", and these with _r1 to _r64" if installed.low_rank else ""
        raise RefusedError(
            f"rkllm-toolkit {installed.version} has no algorithm {job.algorithm!r}; it has"
            f" {', '.join(installed.algorithms)}{more} ({installed.source('algorithms')}).",
            hint="Use normal, which the vendor advises for w8a8 and its grouped types.",
        )
    if match and not 1 <= int(match["rank"]) <= _MOST_RANK:
        raise UsageError(f"The rank of {job.algorithm!r} must be from 1 to {_MOST_RANK}.")
    if match and job.lora:
        raise RefusedError(
            f"{job.algorithm} makes its own LoRA file, and the runtime cannot use another at the same time"
            f" ({installed.source('low_rank')}).",
            hint="Merge the adapter (--lora-mode merge), or use the algorithm without _rN.",
        )
    if algorithm in installed.gpu_algorithms and parse_type(job.dtype).bits != 4:
        raise RefusedError(
            f"{algorithm} is only for w4a16 and its grouped types, but {job.dtype} was asked for"
            f" ({installed.source('gpu_algorithms')}).",
            hint="Use normal, which the vendor advises for w8a8 and its grouped types.",
        )
    if algorithm in installed.gpu_algorithms and job.toolkit_device != "cuda":
        raise RefusedError(
            f"{algorithm} needs a CUDA GPU, but the device is {job.toolkit_device}"
            f" ({installed.source('gpu_algorithms')}).",
            hint="Use --toolkit-device cuda on a machine with an NVIDIA card, or the normal algorithm.",
        )


def _context_notes(job: ToolkitJob, installed: ToolkitRelease) -> list[str]:
    most, step = installed.context["most"], installed.context["step"]
    if job.max_context > most:
        raise RefusedError(
            f"A context of {job.max_context:,} tokens was asked for, but files of rkllm-toolkit {installed.version}"
            f" hold {most:,} at most ({installed.source('context')}).",
            hint=_first_with(lambda row: row.context["most"] >= job.max_context, f"Use --max-context {most}."),
        )
    if job.max_context < step or job.max_context % step:
        raise UsageError(f"The context is {job.max_context}; it must be a multiple of {step}.")
    if not installed.takes("build", "max_context") and job.max_context != most:
        return [
            f"rkllm-toolkit {installed.version} has no max_context: the file itself allows {most:,} tokens, but the"
            f" manifest limits it to {job.max_context:,}, and the runtime enforces that"
        ]
    return []


def _load_notes(job: ToolkitJob, installed: ToolkitRelease) -> list[str]:
    asked = job.toolkit_load_dtype
    loaded = installed.loaded_as(job.toolkit_device, asked)
    if loaded == asked:
        return []
    if installed.load_dtypes:
        why = f"is reported to load {loaded} on the CPU whatever is asked for"
    else:
        why = "cannot be told a type to load"
    source = installed.source("half_on_cpu" if installed.load_dtypes else "load_dtypes")
    return [
        f"rkllm-toolkit {installed.version} {why} ({source}): {asked} saves no memory, which is counted for {loaded}"
    ]
