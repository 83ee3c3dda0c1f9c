"""Inputs known to fail in the vendor's toolkit, checked before any long work: one row per rule.

Types by SoC, release and size are in dtype_rules.yaml, what a release takes in toolkit/versions.yaml, contexts in
context.py, wheels and Pythons in toolkit/wheel.py. The rules here depend on the model's shapes, files and this host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rkconvert.model.groups import SOURCE as GROUP_SOURCE
from rkconvert.model.groups import misfit
from rkconvert.model.shapes import ModelShape
from rkconvert.model.sizes import file_bytes
from rkconvert.output.host_memory import HostMemory
from rkconvert.rules.releases import LOADED_BYTES
from rkconvert.rules.type_names import parse_type
from rkconvert.tensors.memory_folder import Place, open_file
from rkconvert.tensors.shards import is_lfs_pointer
from rkruntime.errors import CheckpointError, HostError, RefusedError, RKEdgeError
from rkruntime.text.template import BOS, END_OF_TURN, START_OF_TURN

LEAST_WIDTH: Final = 96


@dataclass(frozen=True)
class Conversion:
    """A conversion about to start.

    Attributes:
        folder: Folder with the checkpoint's files.
        tokens: Token ids of the tokenizer by text.
        pieces_problem: What is wrong with its tokenizer.model, or empty.
        load_dtype: Data type that weights will have in the toolkit's memory, and `half_hint` how to halve that.
        bos_token_id: From config.json; `bos_token` is the tokenizer's own.
        calibrated: Whether calibration data is given.
    """

    folder: Place
    shape: ModelShape
    dtype: str
    load_dtype: str
    half_hint: str
    memory: HostMemory
    tokens: Mapping[str, int]
    pieces_problem: str
    bos_token_id: int
    bos_token: str
    calibrated: bool


@dataclass(frozen=True)
class Check:
    """A row of the table.

    Attributes:
        found: Function that returns the values for the sentence if the rule is broken, else None.
        kind: Class of the error; None for a warning.
        sentence, hint: Texts, with the names of these values in braces.
        source: Where this is known from.
    """

    name: str
    found: Callable[[Conversion], Mapping[str, Any] | None]
    kind: type[RKEdgeError] | None
    sentence: str
    hint: str
    source: str


@dataclass(frozen=True)
class BrokenRule:
    """A broken rule, in words."""

    rule: Check
    message: str
    hint: str

    def error(self) -> RKEdgeError:
        """Return the error that stops the conversion."""
        kind = self.rule.kind or RefusedError
        details = {"rule": self.rule.name, "source": self.rule.source}
        return kind(f"{self.message} ({self.rule.source}).", hint=self.hint, details=details)


def _narrow(case: Conversion) -> Mapping[str, Any] | None:
    # Half of what a layer caches for a token is its key, half its value.
    width = case.shape.kv_width // 2
    return {"width": width, "least": LEAST_WIDTH} if case.dtype != "fp16" and width < LEAST_WIDTH else None


def _indivisible(case: Conversion) -> Mapping[str, Any] | None:
    found = misfit(case.shape, parse_type(case.dtype))
    return {"sentence": found.sentence, "fits": found.fits} if found else None


def _loaded(case: Conversion) -> int:
    return case.shape.parameters * LOADED_BYTES[case.load_dtype]


def _too_large(case: Conversion) -> Mapping[str, Any] | None:
    need = _loaded(case)
    return _memory_numbers(case, need) if need > case.memory.total else None


def _tight(case: Conversion) -> Mapping[str, Any] | None:
    need = _loaded(case) + file_bytes(case.shape, parse_type(case.dtype))
    tight = need > case.memory.ram and _loaded(case) <= case.memory.total
    return _memory_numbers(case, need) if tight else None


def _memory_numbers(case: Conversion, need: float) -> Mapping[str, Any]:
    lack = max(0.0, need - case.memory.total)
    return {
        "need": f"{need / 1e9:.1f}",
        "load_dtype": case.load_dtype,
        "has": case.memory,
        "lack": f"{lack / 1e9:.0f}",
        "half": case.half_hint,
    }


def _uncalibrated(case: Conversion) -> Mapping[str, Any] | None:
    return {"dtype": case.dtype} if case.dtype.startswith("w8a8") and not case.calibrated else None


def _no_turns(case: Conversion) -> Mapping[str, Any] | None:
    missing = [text for text in (BOS, START_OF_TURN, END_OF_TURN) if text not in case.tokens]
    return {"missing": ", ".join(missing)} if missing else None


def _two_bos(case: Conversion) -> Mapping[str, Any] | None:
    index = case.tokens.get(case.bos_token)
    if index == case.bos_token_id:
        return None
    return {"token": case.bos_token, "index": "no id" if index is None else index, "bos": case.bos_token_id}


def _own_head(case: Conversion) -> Mapping[str, Any] | None:
    return None if case.shape.tied else {}


def _no_pieces(case: Conversion) -> Mapping[str, Any] | None:
    return {"problem": case.pieces_problem} if case.pieces_problem else None


def _head(path: Place) -> bytes:
    with open_file(path) as file:
        return file.read(64)


def _pointers(case: Conversion) -> Mapping[str, Any] | None:
    found = sorted(path.name for path in case.folder.iterdir() if path.is_file() and is_lfs_pointer(_head(path)))
    return {"names": ", ".join(found), "many": "are" if len(found) > 1 else "is"} if found else None


RULES: Final = (
    Check(
        "lfs-pointer",
        _pointers,
        CheckpointError,
        "{names} {many} Git LFS pointers of a few hundred bytes, not the files themselves",
        "Run `git lfs install && git lfs pull` in that folder, or download the model with `hf download`.",
        "convert-checkpoint-unusable: airockchip/rknn-llm issue 75",
    ),
    Check(
        "no-turns",
        _no_turns,
        CheckpointError,
        "The tokenizer has no token {missing}, which every Gemma prompt needs",
        "Take tokenizer.json from the model that this one was made from.",
        "Gemma 2's chat template",
    ),
    Check(
        "narrow",
        _narrow,
        RefusedError,
        "This model's keys have {width} dimensions, but a quantized type needs {least} or more",
        "Use --dtype fp16, or --target emulator, which takes any width.",
        "notes on a copy of rknn-llm 1.3.0, no address is known: export_rkllm says 'dimension ... must be greater than"
        " or equal to 96'",
    ),
    Check(
        "group",
        _indivisible,
        RefusedError,
        "{sentence}",
        "Use w8a8; the largest group that fits every matrix of this model gives {fits}.",
        GROUP_SOURCE,
    ),
    Check(
        "memory",
        _too_large,
        HostError,
        "The toolkit holds the whole model: {need} GB as {load_dtype} alone, but this machine has {has}",
        "Add more than {lack} GB of swap{half}.",
        "airockchip/rknn-llm issues 21, 112, 163: 'Killed'",
    ),
    Check(
        "memory-tight",
        _tight,
        None,
        "The toolkit needs about {need} GB for the model as {load_dtype} and the new file, but this machine has {has}:"
        " it will be slow, and the kernel may kill it",
        "Close other programs, add swap{half}.",
        "predicted: 4 bytes for each weight as float32, or 2 in 16 bits, and the file",
    ),
    Check(
        "uncalibrated",
        _uncalibrated,
        None,
        "{dtype} without calibration data: the toolkit quantizes without having seen typical prompts, so the quality of"
        " answers may suffer",
        "Make it with `rkedge calibrate` and give it with --calibration FILE.",
        "output-quality-quantisation: airockchip/rknn-llm issues 339, 424",
    ),
    Check(
        "two-bos",
        _two_bos,
        None,
        "config.json starts texts with the token {bos}, but the tokenizer with {token!r} ({index}): the toolkit is"
        " given the first in both files",
        "Make the two files agree, if the other one is right.",
        "airockchip/rknn-llm issue 163",
    ),
    Check(
        "own-head",
        _own_head,
        None,
        "The output head is not tied to the embedding, and whether the toolkit keeps a Gemma's own head is not known:"
        " if it exports tensors as llama.cpp does for Gemma, the embedding takes its place without a word",
        "Compare answers of the board with those of a bundle made with --target emulator before you rely on it.",
        "predicted: llama.cpp's converter leaves out a Gemma's lm_head.weight",
    ),
    Check(
        "tokenizer-model",
        _no_pieces,
        None,
        "The tokenizer.model {problem}, and so the toolkit gets none: if it exports tokens as llama.cpp does for Gemma,"
        " it fails after all the work",
        "Put the tokenizer.model of the model that this one was made from beside its tokenizer.json.",
        "predicted: llama.cpp's converter takes Gemma's tokens from that file alone",
    ),
)  # fmt: skip


def run(case: Conversion, rules: Sequence[Check] = RULES) -> list[BrokenRule]:
    """Return every broken rule, in the order of the table."""
    findings = []
    for rule in rules:
        numbers = rule.found(case)
        if numbers is not None:
            findings.append(BrokenRule(rule, rule.sentence.format(**numbers), rule.hint.format(**numbers)))
    return findings


def require(case: Conversion) -> list[str]:
    """Return warnings as notes; raises the first finding that is an error."""
    findings = run(case)
    for finding in findings:
        if finding.rule.kind is not None:
            raise finding.error()
    return [f"{finding.message}. {finding.hint}" for finding in findings]
