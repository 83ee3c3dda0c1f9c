"""Check the records that come back for a command: the library can write to the worker's pipes, so none is trusted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rkruntime.engine.worker.protocol import EMBED, ERROR, FINISHED, HIDDEN, LOGITS, MAX_DATA, REPLY, TOKEN, TOKENIZE
from rkruntime.errors import WorkerProtocolError

# Limits of a record's data in bytes. A token is a few letters; a text to tokenize is a prompt, and has fewer ids.
_SIZES: Final = {
    TOKEN: 1 << 16,
    LOGITS: MAX_DATA,
    HIDDEN: MAX_DATA,
    FINISHED: 1 << 16,
    REPLY: 1 << 20,
    ERROR: 1 << 20,
    TOKENIZE: 1 << 24,
    EMBED: 1 << 24,
}
# Limit of an array's columns; no vocabulary or layer is wider.
_MOST_COLUMNS: Final = 1 << 20
_MODES: Final = {"generate": {TOKEN}, "logits": {TOKEN, LOGITS}, "hidden": {HIDDEN}}


class Exchange:
    """One command and the records that belong to it.

    Args:
        number: Number of the command, which its records carry mod 2^16.
        mode: Mode of a run; None for any other command, which has one reply.
        questions: Kinds of questions that the caller can answer.
        batches: Prompts of the run.
        most_tokens: Most tokens per prompt; -1 for any number.
        most_rows: Most rows of an array.
        late_rows: Most rows of an earlier run's array, which is dropped; with 0, such an array is an error.
    """

    def __init__(
        self,
        number: int,
        mode: str | None = None,
        questions: Iterable[int] = (),
        *,
        batches: int = 1,
        most_tokens: int = -1,
        most_rows: int = 0,
        late_rows: int = 0,
    ) -> None:
        self._number = number & 0xFFFF
        self._kinds = {ERROR, *questions, *({REPLY} if mode is None else _MODES[mode] | {FINISHED})}
        self._batches, self._most_tokens = batches, most_tokens
        self._most_rows, self._late_rows = most_rows, late_rows
        self._tokens = [0] * batches
        self._finished = 0

    def accepts(self, kind: int, batch: int, run: int, value: int, size: int) -> bool:
        """Whether a record, by its head, belongs to this exchange; one of an earlier exchange is to be dropped.

        Raises:
            WorkerProtocolError: The worker must not send this.
        """
        if size > _SIZES.get(kind, -1):
            raise lie(f"a record of the kind {kind} with {size:,} bytes")
        if run != self._number:
            # A library may call back after its run is over, but an unexpected array is too large to read and drop.
            is_array = kind in (LOGITS, HIDDEN)
            if (run - self._number) & 0xFFFF < 1 << 15 or (is_array and not self._late_rows):
                raise lie(f"a record of the run {run} during the run {self._number}")
            if is_array:
                _check_array(value, size, self._late_rows)
            return False
        if kind not in self._kinds or batch >= self._batches:
            raise lie(f"a record of the kind {kind} for the prompt {batch}, which was not asked for")
        if kind == TOKEN:
            count = self._tokens[batch] = self._tokens[batch] + 1
            if value < 0 or count > self._most_tokens >= 0:
                raise lie(f"token {value} as number {count:,} of at most {self._most_tokens:,}")
        elif kind == FINISHED:
            self._finish(batch)
        elif kind in (LOGITS, HIDDEN):
            _check_array(value, size, self._most_rows)
        return True

    def _finish(self, batch: int) -> None:
        if batch != self._finished:
            raise lie(f"the end of prompt {batch} instead of {self._finished}")
        self._finished += 1


def _check_array(columns: int, size: int, most_rows: int) -> None:
    if not 0 < columns <= _MOST_COLUMNS or size % (columns * 4) or size > columns * 4 * most_rows:
        raise lie(f"an array of {size:,} bytes with {columns:,} columns and at most {most_rows:,} rows")


def lie(what: str) -> WorkerProtocolError:
    """Return the error for a worker that sent `what`."""
    return WorkerProtocolError(f"The worker sent {what}, and was killed.")
