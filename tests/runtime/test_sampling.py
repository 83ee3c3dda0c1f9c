"""One range for a sampling field, whichever way it is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from rkruntime.cli.options import sampling_options
from rkruntime.engine.generation import PER_REQUEST, Request, Sampling
from rkruntime.engine.open import SamplingOptions
from rkruntime.errors import BodyError, UsageError
from rkruntime.serve.api.validate import Ignored, Validator
from rkruntime.serve.app import openapi
from rkruntime.serve.settings import Settings, load_settings

# The least and the greatest value, and the closest ones that are refused.
RANGES: dict[str, tuple[float, float, float, float]] = {
    "temperature": (0, 10, -0.01, 10.01),
    "top_k": (1, 16_777_216, 0, 16_777_217),
    "top_p": (0, 1, -0.01, 1.01),
    "repeat_penalty": (0.01, 10, 0.009, 10.01),
    "frequency_penalty": (-2, 2, -2.01, 2.01),
    "presence_penalty": (-2, 2, -2.01, 2.01),
    "mirostat": (0, 2, -1, 3),
    "mirostat_tau": (0, 100, -0.01, 100.1),
    "mirostat_eta": (0, 1, -0.01, 1.01),
    "max_new_tokens": (1, 1_048_576, 0, 1_048_577),
}
OPTIONS = {"temperature", "top_k", "top_p", "repeat_penalty", "max_new_tokens"}
IN_REQUESTS = {*RANGES} - {"mirostat", "mirostat_tau", "mirostat_eta"}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ChatRequest": ("max_tokens", {"messages": [{"role": "user", "content": "?"}]}),
    "CompletionRequest": ("max_tokens", {"prompt": "?"}),
    "OllamaOptions": ("num_predict", {}),
    "SessionMessage": ("max_tokens", {"content": "?"}),
}


@click.command()
@sampling_options
def command(sampling: SamplingOptions) -> None:
    pass


def ways(name: str, folder: Path) -> Iterator[tuple[str, Callable[[float], object]]]:
    """Every way to set a field, as a function that fails for a value that is refused."""

    def on_the_command_line(value: float) -> None:
        command.main([f"--{name.replace('_', '-')}={value}"], standalone_mode=False)

    def in_the_settings(value: float) -> None:
        (folder / "daemon.yaml").write_text(yaml.safe_dump({name: value}))
        load_settings(folder / "daemon.yaml")

    if name in OPTIONS:
        yield "command line", on_the_command_line
        yield "SamplingOptions", lambda value: SamplingOptions(**{name: value})
    if name == "max_new_tokens":
        yield "Request", lambda value: Request([1], max_new_tokens=value or -2)  # type: ignore[arg-type]
    else:
        yield "Sampling", lambda value: Sampling(**{name: value})
        if name in OPTIONS:
            yield "settings", in_the_settings
    if name in IN_REQUESTS:
        validator = Validator(openapi())
        for schema, (tokens, rest) in BODIES.items():
            key = tokens if name == "max_new_tokens" else name
            yield schema, lambda value, s=schema, k=key, r=rest: validator.read(s, {**r, k: value}, Ignored())


@pytest.mark.parametrize("name", RANGES)
def test_each_way_has_the_same_range(tmp_path: Path, name: str) -> None:
    for way, take in ways(name, tmp_path):
        least, most, below, above = RANGES[name]
        for value in (least, most):
            take(value)
        if name == "max_new_tokens" and way == "OllamaOptions":  # where 0 and below are no limit
            below = -3
        if name == "max_new_tokens" and way in BODIES:  # a request's is taken for the most there can be
            take(above)
            above = below
        for value in (below, above):
            with pytest.raises((UsageError, BodyError, click.BadParameter)):
                take(value)
                pytest.fail(f"{way} took {name} {value}")


def test_no_way_lacks_a_field() -> None:
    """Expected names are the test's own: a field that is added anywhere must be here too."""
    assert {item.name for item in fields(Sampling)} | {"max_new_tokens"} == {*RANGES}
    assert {item.name for item in fields(SamplingOptions)} == OPTIONS
    assert {item.name for item in fields(Settings)} & {*RANGES} == OPTIONS - {"max_new_tokens"}
    assert {item.name for item in command.params} == OPTIONS
    assert {*PER_REQUEST} == IN_REQUESTS - {"max_new_tokens"}
    schemas = openapi()["components"]["schemas"]
    for schema, (tokens, _) in BODIES.items():
        assert IN_REQUESTS - {"max_new_tokens"} | {tokens} <= {*schemas[schema]["properties"]}
        assert "mirostat" not in schemas[schema]["properties"]


def test_an_option_says_its_range() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert "[0.01<=x<=10]" in text
    assert "0 takes the most likely" in text
    assert "what the context has room" in text
