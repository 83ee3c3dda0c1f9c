"""Options that several commands of the converter share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import click

from rkconvert.rules.context import DEFAULT_CONTEXT
from rkconvert.rules.quantized_types import known_types
from rkruntime.cli.flags import TOKENS

Decorator: TypeAlias = Callable[[Any], Any]


def revision_option() -> Decorator:
    """`--revision`."""
    return click.option("--revision", help="Use this branch, tag or commit of a hub model.")


def lora_option(required: bool = False) -> Decorator:
    """`--lora`, as the parameter `loras`."""
    return click.option(
        "--lora",
        "loras",
        multiple=True,
        required=required,
        metavar="ADAPTER[=WEIGHT]",
        help="Apply this LoRA adapter, a folder or a hub id, with this weight; may be repeated.",
    )


def max_context_option() -> Decorator:
    """`--max-context`."""
    return click.option(
        "--max-context",
        type=TOKENS,
        metavar="TOKENS",
        show_default=f"the model's limit, at most {DEFAULT_CONTEXT}",
        help="Set the context length.",
    )


def dtype_option(*more: str) -> Decorator:
    """`--dtype`: a type of a board, or one of `more`."""
    return click.option(
        "--dtype",
        type=click.Choice([*known_types(), *more]),
        default="w8a8",
        show_default=True,
        help="Use this quantized type.",
    )


def release_option(**settings: Any) -> Decorator:
    """`--release`; `settings` say what the command does without it."""
    return click.option("--release", help="Target this RKLLM release.", **settings)


def public_option() -> Decorator:
    """`--public`."""
    return click.option("--public", is_flag=True, help="Make the repository public; otherwise it is private.")
