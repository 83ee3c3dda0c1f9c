"""SHA-256 of large files, computed in a thread of its own while other work goes on.

Hashing takes as long as quantizing, but only one core: after the work it would add its whole time. hashlib and the
kernel release the interpreter lock meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

from rkconvert.progress import Advance
from rkconvert.tensors.inputs import FileState
from rkruntime.errors import InputError
from rkruntime.files import read_error, sha256_file

_LOOK_EVERY_S: Final = 0.1


class HashesAhead:
    """Hashes of files, computed one after the other from creation on. `close` cancels what is not finished."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stop = threading.Event()
        self._read: dict[Path, int] = dict.fromkeys(files, 0)
        self._pool = ThreadPoolExecutor(1, "hashing")
        self._found: dict[Path, Future[str]] = {file: self._pool.submit(self._hash, file) for file in self._read}

    def _hash(self, file: Path) -> str:
        def step(count: int) -> None:
            if self._stop.is_set():
                raise CancelledError
            self._read[file] += count

        return sha256_file(file, step)

    def __contains__(self, file: Path) -> bool:
        return file in self._found

    def left(self, files: Iterable[Path]) -> int:
        """Return the bytes of these files still to be read, by their present sizes; 0 for a file that is gone."""
        states = {file: FileState.of(file) for file in files if not self._found[file].done()}
        return sum(max(0, state.size - self._read[file]) for file, state in states.items() if state)

    def of(self, file: Path, advance: Advance = lambda _: None, kind: type[InputError] = InputError) -> str:
        """Wait for a file's hash and return it. Raises `kind` if the file cannot be read."""
        seen, done = self._read[file], False
        while not done:
            done = bool(wait([self._found[file]], _LOOK_EVERY_S).done)
            before, seen = seen, self._read[file]
            advance(seen - before)
        try:
            return self._found[file].result()
        except OSError as error:
            raise read_error(file, error, kind) from error

    def close(self) -> None:
        """Stop hashing; return once nothing is read anymore."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
