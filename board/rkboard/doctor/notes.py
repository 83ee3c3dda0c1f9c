"""What a program says on standard error: ssh, sudo, or what they run on a board."""

from __future__ import annotations

import os
import threading
from typing import IO, Final

from rkruntime.printable import one_line

_MOST_BYTES: Final = 1 << 14
_MOST_LINES: Final = 12
# For what a process that has ended may have left in its pipe.
_LAST_S: Final = 1.0


class Notes:
    """The end of what a process says on standard error, in bounded memory.

    Nobody waits for the end of the stream: a child, such as the master of ssh's shared connections, may keep it open.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._text, self._enough = b"", False
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while not self._enough and (block := os.read(stream.fileno(), _MOST_BYTES)):
                self._text = (self._text + block)[-_MOST_BYTES:]

    def lines(self) -> list[str]:
        """Its last lines, when the process has ended."""
        self._reader.join(_LAST_S)
        self._enough = True
        return [one_line(line) for line in self._text.decode("utf-8", "replace").splitlines()][-_MOST_LINES:]
