"""Read a log of any size in bounded memory: its head, its tail, and the lines in between that may matter.

Logs are long because they repeat themselves. Lines that differ only in digits and the letters of hexadecimal numbers
count as repeats. Only the first of them is searched for the texts of the table, which takes a thousand times as long as
recognizing a repeat. If it has such a text, its next repeats and the last one are searched too, since their numbers may
differ. Lines with a text of the table are kept together with the lines around them. Lines that are not repeats are
searched up to a limit; those beyond it are only counted.
"""

from __future__ import annotations

import codecs
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, Final, NamedTuple

from rkruntime.checks import logtext
from rkruntime.checks.failures import Table
from rkruntime.checks.logtext import HEAD, TAIL
from rkruntime.checks.signatures import Log, Signature, starts

MIDDLE: Final = 256 * 1024
"""Characters kept of what is between head and tail."""
_AROUND: Final = 10
"""Lines kept on each side of one that has a text of the table: as near as a line of RKLLM's must be to count."""
_WIDTH: Final = 500
"""Bytes kept of each of those lines."""
_FIRST: Final = 3
"""Occurrences of a text that are kept: the first ones, and the last."""
_REPEATS: Final = 16
"""Repeats searched of a line with a text of the table; the last one is always searched too."""
_REPEATED: Final = 4 << 20
"""Bytes of repeats searched: each piece of an endless line is a repeat of a megabyte."""
_MOST_TELLING: Final = 500
"""Lines with a text of the table, other than repeats, whose repeats are looked for."""
_DISTINCT: Final = 8 << 20
"""Bytes of lines searched that are not repeats; half as many again for lines that may be RKLLM's."""
_OWN: Final = (b"rk", b"RK", b"npu", b"NPU")
_BLOCK: Final = 1 << 16
"""Bytes that are looked at together: they stay in the processor's cache."""
_OVERLAP: Final = 400
"""Bytes that two pieces of an endless line have in common; texts of the table are shorter."""
_NUMBERS: Final = b"0123456789abcdefABCDEF"
_RETURN_ENDS_LINE: Final = bytes.maketrans(b"\r", b"\n")
_MOST_BLOCKS: Final = 4
_LEFT_OUT: Final = "[lines of the log left out]"


@dataclass(frozen=True)
class ReadLog:
    """The text of a log to be explained, and how much of the log was neither searched nor a repeat."""

    text: str
    skipped_lines: int = 0
    skipped_bytes: int = 0


def read_log(stream: BinaryIO, rows: Table) -> ReadLog:
    """Read a file or pipe to its end and decode it.

    Args:
        rows: Table whose texts are kept, wherever they are in the log.
    """
    head = _read(stream, HEAD)
    encoding = logtext.encoding(head)
    middle, blocks = _Middle(rows, encoding, head[-_OVERLAP:]), deque[bytes]()
    while block := _read(stream, _BLOCK):
        blocks.append(block)
        if len(blocks) > TAIL // _BLOCK + 1:
            middle.add(blocks.popleft())
    tail = b"".join(blocks)
    # An even number of bytes: half a character of UTF-16 would spoil everything after it.
    if (more := len(tail) - TAIL & ~1) > 0:
        middle.add(tail[:more])
        tail = tail[more:]
    if middle.empty:
        return ReadLog(logtext.decode(head + tail))
    middle.finish(tail[:_OVERLAP])
    parts = [head.decode(encoding, "replace"), *middle.kept(), tail.decode(encoding, "replace")]
    return ReadLog("\n".join(parts), middle.skipped_lines, middle.skipped_bytes)


def read_text(text: str, rows: Table) -> ReadLog:
    """Do the same as `read_log` for a text in memory."""
    if len(text) <= HEAD + TAIL:
        return ReadLog(text)
    return read_log(io.BytesIO(text.encode("utf-8", "replace")), rows)


def _read(stream: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, fewer only at the end: a pipe returns whatever it has."""
    found = stream.read(size)
    while 0 < len(found) < size and (part := stream.read(size - len(found))):
        found += part
    return found


class _Place(NamedTuple):
    """The position of a line: the number of its block, and its number in the block."""

    block: int
    line: int


@dataclass(frozen=True)
class _Around:
    """A line with the lines before and after it."""

    before: tuple[bytes, ...]
    line: bytes
    after: tuple[bytes, ...]

    @classmethod
    def of(cls, lines: Sequence[bytes], number: int) -> _Around:
        """Return the line of this number with its neighbors."""
        first = max(0, number - _AROUND)
        before, after = lines[first:number], lines[number + 1 : number + 1 + _AROUND]
        return cls(tuple(line[-_WIDTH:] for line in before), lines[number], tuple(line[:_WIDTH] for line in after))


class _Middle:
    """The lines kept of the middle of a log, which is read block by block."""

    def __init__(self, rows: Table, encoding: str, head: bytes) -> None:
        self._rows, self._signatures = rows, _all_signatures(rows)
        wide = encoding.startswith("utf-16")
        self._decoder = codecs.getincrementaldecoder(encoding)("replace") if wide else None
        self._encoding = "utf-8" if wide else encoding
        self._carry = self._narrow(head)
        self._block = 0
        self._seen: set[bytes] = set()
        self._telling: dict[bytes, int] = {}
        # The block in which each telling line was last seen, those blocks, and the lines taken from dropped blocks.
        self._latest: dict[bytes, int] = {}
        self._blocks: dict[int, bytes] = {}
        self._ends: dict[bytes, tuple[_Place, _Around]] = {}
        self._left, self._left_for_own, self._left_for_repeats = _DISTINCT, _DISTINCT // 2, _REPEATED
        self._first: dict[str, list[_Place]] = {}
        self._last: dict[str, _Place] = {}
        self._texts: dict[_Place, list[str]] = {}
        self.skipped_lines = self.skipped_bytes = 0

    @property
    def empty(self) -> bool:
        """Whether no block was added."""
        return not self._block

    def add(self, block: bytes) -> None:
        """Search the next bytes of the log."""
        self._block += 1
        block = self._narrow(block)
        if end := max(block.rfind(b"\n"), block.rfind(b"\r")) + 1:
            lines, self._carry = b"".join((self._carry, memoryview(block)[:end])), block[end:]
            self._search(lines)
            return
        self._carry += block
        if len(self._carry) > TAIL:
            data, self._carry = self._carry, self._carry[-_OVERLAP:]
            self._search(data)

    def finish(self, tail: bytes) -> None:
        """Search the unfinished last line up to the tail's first bytes, and the last repeat of each telling line."""
        self._block += 1
        self._search(self._carry + self._narrow(tail))
        for block in list(self._blocks):
            self._take_ends(block)
        self._look(list(self._ends.values()))

    def kept(self) -> Iterator[str]:
        """Yield the lines found, in order, with a mark where lines are left out; MIDDLE characters at most."""
        places = {place for several in self._first.values() for place in several} | set(self._last.values())
        room = MIDDLE
        yield _LEFT_OUT
        for place in sorted(places):
            lines = self._texts[place]
            room -= sum(map(len, lines))
            if room > 0:
                yield from (*lines, _LEFT_OUT)
            else:
                self._skip(sum(map(len, lines)), len(lines))

    def _narrow(self, data: bytes) -> bytes:
        return self._decoder.decode(data).encode("utf-8", "replace") if self._decoder else data

    def _skip(self, size: int, lines: int = 1) -> None:
        self.skipped_lines += lines
        self.skipped_bytes += size

    def _search(self, data: bytes) -> None:
        """Search a block of whole lines."""
        keys = _keys(data)
        there = set(keys)
        fresh, told = there - self._seen, there & self._telling.keys()
        if told:
            self._remember(told, data)
        again = {key for key in told if self._telling[key] < _REPEATS}
        if not fresh and not again:
            return
        self._telling |= {key: self._telling[key] + 1 for key in again}
        lines = _lines(data)
        chosen = sorted(self._chosen(keys, lines, fresh, again))
        for number in self._look([(_Place(self._block, number), _Around.of(lines, number)) for number in chosen]):
            if len(self._telling) < _MOST_TELLING:
                self._telling.setdefault(keys[number], 0)

    def _remember(self, told: set[bytes], data: bytes) -> None:
        """Note that these lines were last seen in this block, and keep the block as long as that is true."""
        self._latest |= dict.fromkeys(told, self._block)
        self._blocks[self._block] = data
        wanted = set(self._latest.values())
        self._blocks = {number: block for number, block in self._blocks.items() if number in wanted}
        if len(self._blocks) > _MOST_BLOCKS:
            self._take_ends(min(self._blocks))

    def _take_ends(self, number: int) -> None:
        """Take the lines that were last seen in a block from it, and drop the block."""
        data = self._blocks.pop(number)
        keys, lines = _keys(data), _lines(data)
        last = dict(zip(keys, range(len(keys)), strict=True))
        for key in [key for key, block in self._latest.items() if block == number]:
            del self._latest[key]
            self._ends[key] = _Place(number, last[key]), _Around.of(lines, last[key])

    def _chosen(self, keys: list[bytes], lines: list[bytes], fresh: set[bytes], again: set[bytes]) -> set[int]:
        """Return the numbers of the first of each of these lines, and of the lines after them, where they may go on."""
        chosen: set[int] = set()
        for number, key in enumerate(keys):
            if key in fresh:
                if not self._affords(lines[number]):
                    self._skip(len(lines[number]))
                    continue
                fresh.discard(key)
                self._seen.add(key)
            elif key in again and len(lines[number]) <= self._left_for_repeats:
                again.discard(key)
                self._left_for_repeats -= len(lines[number])
            else:
                continue
            chosen |= {number, min(number + 1, len(lines) - 1)}
        return chosen

    def _affords(self, line: bytes) -> bool:
        """Whether the limits allow searching a line that is not a repeat; counts the line against them."""
        if len(line) <= self._left:
            self._left -= len(line)
            return True
        if len(line) <= self._left_for_own and any(name in line for name in _OWN):
            self._left_for_own -= len(line)
            return True
        return False

    def _look(self, places: Sequence[tuple[_Place, _Around]]) -> set[int]:
        """Keep the lines that have a text of the table; returns their numbers."""
        if not places:
            return set()
        owners: list[int] = []
        clean: list[str] = []
        for at, (_, around) in enumerate(places):
            for line in logtext.clean_lines(self._decoded(around.line)):
                owners.append(at)
                clean.append(line)
        log, found = Log(clean, {}), set()
        for name, position in self._named(log):
            number = log.number_at(position)
            place, around = places[owners[number]]
            self._keep(name, place)
            # Only the pieces of a long line, or the lines of one with spelled-out breaks, that are near the text.
            near = [clean[at] for at in range(number - 2, number + 3) if self._same(owners, at, number)]
            self._texts[place] = [*self._cleaned(around.before), *near, *self._cleaned(around.after)]
            found.add(place.line)
        self._forget()
        return found

    def _named(self, log: Log) -> Iterator[tuple[str, int]]:
        """Yield the texts of the table in a log, each with its position."""
        yield from (("", position) for position in islice(starts(self._rows.own, log.text), _FIRST))
        for signature in self._signatures:
            yield from ((signature.source, position) for position in signature.matches(log))

    @staticmethod
    def _same(owners: Sequence[int], at: int, number: int) -> bool:
        return 0 <= at < len(owners) and owners[at] == owners[number]

    def _cleaned(self, lines: Iterable[bytes]) -> list[str]:
        return [clean for line in lines for clean in logtext.clean_lines(self._decoded(line))]

    def _keep(self, name: str, place: _Place) -> None:
        several = self._first.setdefault(name, [])
        if len(several) < _FIRST:
            several.append(place)
        elif place not in several:
            self._last[name] = max(place, self._last.get(name, place))

    def _forget(self) -> None:
        """Drop lines that are neither among the first occurrences of a text nor the last."""
        wanted = {place for several in self._first.values() for place in several} | set(self._last.values())
        self._texts = {place: lines for place, lines in self._texts.items() if place in wanted}

    def _decoded(self, line: bytes) -> str:
        return line.decode(self._encoding, "replace")


def _lines(data: bytes) -> list[bytes]:
    return data.translate(_RETURN_ENDS_LINE).split(b"\n")


def _keys(data: bytes) -> list[bytes]:
    """Return a key for each line, in order; the repeats of a line have the same key."""
    return data.translate(_RETURN_ENDS_LINE, _NUMBERS).split(b"\n")


def _all_signatures(rows: Table) -> list[Signature]:
    """Return each signature of the table once."""
    every = [signature for rule in rows.rules for group in (*rule.all, rule.none) for signature in group]
    every += [signature for exclusion in rows.exclusions for signature in exclusion.any]
    every += [signature for several in rows.facts.values() for signature in several]
    return list({signature.source: signature for signature in every}.values())
