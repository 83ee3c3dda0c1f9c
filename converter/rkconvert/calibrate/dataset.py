"""The JSON file that rkllm-toolkit reads: a list of `{"input": ..., "target": ...}`.

The input already has the chat template, and the target is the expected answer (manual 1.1.0, p. 15; the vendor's
data_quant.json @ 1.3.0 has 19 such objects).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.model.chat_template import ChatTemplate
from rkconvert.model.tokenizer import tokenizer_bytes
from rkconvert.tensors.memory_folder import Place
from rkconvert.tensors.shards import refuse_lfs_pointer
from rkruntime.errors import CalibrationError, InputError
from rkruntime.files import atomic_file, read_error, read_regular

KEYS: Final = ("input", "target")
MOST_BYTES: Final = 64 << 20
_SHOWN: Final = 60


@dataclass(frozen=True)
class Sample:
    """A prompt in the model's template, and its expected answer."""

    input: str
    target: str


class TokenCounter:
    """Counts tokens of templated text, control tokens included."""

    def __init__(self, tokenizer_file: Place) -> None:
        from rkruntime.text.tokenizer import open_backend

        try:
            self._backend = open_backend(tokenizer_bytes(tokenizer_file), tokenizer_file)
        except InputError as error:
            raise CalibrationError(f"{tokenizer_file} cannot be read to count tokens: {error.message}") from error

    def __call__(self, text: str) -> int:
        """Return the number of tokens."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that already has its `<bos>`."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def validate_dataset(
    path: Path,
    template: ChatTemplate | None = None,
    count: TokenCounter | None = None,
    max_context: int | None = None,
) -> list[Sample]:
    """Read a calibration file and check all of it.

    Args:
        template: Chat template of the model; every input must begin with `<bos>` and end where its answer starts.
        count, max_context: Most tokens in a row, and the function that counts them.

    Raises:
        CalibrationError: With the number of the first invalid row, counted from 1.
    """
    data = _read(path)
    if not isinstance(data, list):
        raise CalibrationError(f"{path} is a JSON {type(data).__name__}; calibration data is a list of objects.")
    if not data:
        raise CalibrationError(f"{path} is an empty list.")
    ending, bos = (template.ending, template.special_tokens["bos_token"]) if template else ("", "")
    rows = [_row(path, number, item) for number, item in enumerate(data, start=1)]
    for number, row in enumerate(rows, start=1):
        if not row.input.endswith(ending):
            raise CalibrationError(
                f"{path}: the input of row {number} is not in this model's chat template: it should end with"
                f" {ending!r}, but ends with {row.input[-_SHOWN:]!r}."
            )
        if not row.input.startswith(bos):
            raise CalibrationError(
                f"{path}: the input of row {number} does not begin with {bos}, without which Gemma computes other"
                " activations.",
                hint="Make the file with `rkedge calibrate`, or put it in front of every input.",
            )
        if count and max_context and (tokens := count(row.input) + count(row.target)) > max_context:
            raise CalibrationError(
                f"{path}: row {number} has {tokens:,} tokens; the context is {max_context:,}.",
                hint="Leave the row out or shorten it.",
            )
    return rows


def _read(path: Path) -> Any:
    try:
        data = read_regular(path, MOST_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise CalibrationError(
                f"{path} exceeds {MOST_BYTES >> 20} MiB; a few dozen rows are enough, and each costs time."
            ) from error
        raise read_error(path, error, CalibrationError) from error
    refuse_lfs_pointer(path, data[:64], CalibrationError)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {error}.") from error


def _row(path: Path, number: int, item: Any) -> Sample:
    if not isinstance(item, dict):
        raise CalibrationError(f"{path}: row {number} is a JSON {type(item).__name__}, not an object.")
    if "input_embed" in item:
        raise CalibrationError(f"{path}: row {number} has embeddings (input_embed), which are for multimodal models.")
    if set(item) != set(KEYS):
        found = ", ".join(sorted(map(str, item))) or "none"
        raise CalibrationError(f"{path}: row {number} has the keys {found}; they must be {' and '.join(KEYS)}.")
    for key in KEYS:
        if not isinstance(item[key], str) or not item[key].strip() or not is_unicode(item[key]):
            raise CalibrationError(f"{path}: the {key} of row {number} is {_shorten(item[key])}, not a string.")
    return Sample(item["input"], item["target"])


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded; JSON can express half of a surrogate pair, such as "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def write_dataset(path: Path, rows: Sequence[Sample]) -> None:
    """Write the file completely or not at all. Raises OutputError or HostError."""
    with atomic_file(path) as partial:
        text = json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
