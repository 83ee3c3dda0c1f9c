"""Options that only the vendor's toolkit supports, defined once for the command and for the toolkit's calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import click

from rkconvert.toolkit.interpreter import VARIABLE
from rkruntime.cli.flags import Number

DEVICES: Final = ("cpu", "cuda")
PATIENCE: Final = 900.0
"""Seconds without output, CPU use or paging after which the toolkit counts as hung."""
_PATH: Final = click.Path(path_type=Path)


def _row(argument: str = "", **click_option: Any) -> Mapping[str, Any]:
    """Return the metadata for a field's click option; `argument` is the toolkit's own name for it, if it has one."""
    return {"argument": argument, "option": click_option}


@dataclass(frozen=True, kw_only=True)
class ToolkitOptions:
    """Options of the toolkit, by the names of the command's options."""

    toolkit_python: Path | None = field(
        default=None,
        metadata=_row(
            type=_PATH,
            show_default=f"${VARIABLE}, else searched for",
            help="Use the rkllm-toolkit installed for this Python interpreter.",
        ),
    )
    calibration: Path | None = field(
        default=None,
        metadata=_row(
            "dataset", type=_PATH, help="Calibrate with these texts, from `rkedge calibrate` (toolkit only)."
        ),
    )
    algorithm: str = field(
        default="normal",
        metadata=_row("quantized_algorithm", show_default=True, help="Quantize with this algorithm (toolkit only)."),
    )
    optimization_level: int = field(
        default=1,
        metadata=_row(
            "optimization_level",
            type=click.IntRange(0, 1),
            show_default=True,
            help="Set the toolkit's optimization level; 1 may be more accurate and slower.",
        ),
    )
    hybrid_rate: float = field(
        default=0.0,
        metadata=_row(
            "hybrid_rate",
            type=Number(0, 1, max_open=True),
            show_default=True,
            help="Quantize this fraction of the layers in the other type, grouped or ungrouped (toolkit only).",
        ),
    )
    qparams: Path | None = field(
        default=None,
        metadata=_row("extra_qparams", type=_PATH, help="Reuse the *.qparams file of an earlier run (toolkit only)."),
    )
    toolkit_device: str = field(
        default="cpu",
        metadata=_row(
            "device", type=click.Choice(DEVICES), show_default=True, help="Run the toolkit on the CPU or on a CUDA GPU."
        ),
    )
    toolkit_load_dtype: str = field(
        default="float32",
        metadata=_row("dtype", show_default=True, help="Load the weights in this data type (toolkit only)."),
    )
    toolkit_patience: float = field(
        default=PATIENCE,
        metadata=_row(
            type=Number(1, 1_000_000),
            metavar="SECONDS",
            show_default=True,
            help="Kill the toolkit after this long without output, CPU use or paging.",
        ),
    )
    verify: bool = field(
        default=False,
        metadata=_row(
            is_flag=True,
            help="Compare the toolkit's logits of three prompts with those of the float model (toolkit only).",
        ),
    )

    @property
    def by_name(self) -> dict[str, Any]:
        """These options alone; a record that inherits them has further fields."""
        return {item.name: getattr(self, item.name) for item in fields(ToolkitOptions)}

    @property
    def files(self) -> dict[str, Path]:
        """Files that the toolkit itself reads, by the command's option."""
        given = (item.name for item in fields(ToolkitOptions) if item.metadata["argument"])
        return {_flag(name): value for name in given if isinstance(value := getattr(self, name), Path)}

    @property
    def arguments(self) -> dict[str, Any]:
        """Values by the toolkit's own names, with paths as strings."""
        named = {item.metadata["argument"]: getattr(self, item.name) for item in fields(ToolkitOptions)}
        return {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in named.items() if key}

    def given(self) -> list[str]:
        """Return the names of the command-line options that differ from their default."""
        return [_flag(item.name) for item in fields(ToolkitOptions) if getattr(self, item.name) != item.default]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def toolkit_options(*only: str, **defaults: Any) -> Callable[[Any], Any]:
    """Add these options to a command, or those named `only`; `defaults` replace their defaults."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for item in reversed(fields(ToolkitOptions)):
            if not only or item.name in only:
                default = defaults.get(item.name, item.default)
                command = click.option(_flag(item.name), default=default, **item.metadata["option"])(command)
        return command

    return add
