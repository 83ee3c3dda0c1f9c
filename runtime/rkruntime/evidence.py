"""What a run on a board has shown, as a file of the schema rkedge-compat/1 (docs/compat.md).

`rkedge bench` and `rkedge compat --board` write it, and `rkedge compat` takes it as evidence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from rkruntime.schema import Between, Length

SCHEMA: Final = "rkedge-compat/1"
MOST_BYTES: Final = 1 << 20
MOST_CONTEXT: Final = 1 << 20
MOST_RAM_GIB: Final = 4096
LONGEST_NAME: Final = 200

_Name = Annotated[str, Length(LONGEST_NAME)]
_Line = Annotated[str, Length(500)]
_Count = Annotated[int, Between(0, 1 << 40)]
_Figure = Annotated[float, Between(0, 1e12)]


@dataclass(frozen=True)
class ResultModel:
    """The model: `digest` is Case.digest, which knows it by its shape."""

    name: _Name
    digest: _Name


@dataclass(frozen=True)
class ResultBoard:
    """The board as it was during the run."""

    name: _Name
    soc: _Name
    kernel: _Name
    driver: _Name
    library: _Name
    ram_gib: Annotated[float, Between(0, MOST_RAM_GIB)] = 0.0


@dataclass(frozen=True)
class Probe:
    """What the library did when it was asked one of `rkruntime.probes.QUESTIONS`; empty if that was not decided."""

    name: _Name
    result: _Name
    says: _Line


@dataclass(frozen=True)
class Run:
    """One cell that was tried.

    Attributes:
        release: Of the toolkit that made the file.
        status: As in `Status`.
        says: What happened, in a sentence.
        tokens_per_s, first_token_ms, memory_mb: 0 if not measured; memory in MiB.
        file_sha256: Of the model file.
        selftest: The verdict of the bundle's self-test.
        clocks: In Hz, during a run, by the device's or the CPU policy's name.
    """

    type: _Name
    release: _Name
    cores: Annotated[int, Between(1, 16)]
    context: Annotated[int, Between(1, MOST_CONTEXT)]
    lora: Literal["merged", "runtime"]
    status: Literal["works", "works but slower", "refused by the toolkit", "fails at load", "wrong answers"]
    says: _Line
    log: tuple[_Line, ...] = ()
    tokens_per_s: _Figure = 0.0
    first_token_ms: _Figure = 0.0
    memory_mb: _Figure = 0.0
    file_sha256: _Name = ""
    selftest: _Name = ""
    probes: tuple[Probe, ...] = ()
    clocks: dict[str, _Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What every result file has.

    Attributes:
        emulated: The board was the emulator, so that nothing in it is a board's.
    """

    schema: Literal["rkedge-compat/1"]
    made: _Name
    rkedge: _Name
    emulated: bool
    model: ResultModel
    board: ResultBoard
    runs: tuple[Run, ...]
