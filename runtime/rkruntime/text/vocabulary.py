"""The texts of a tokenizer's ids, and which ids are control tokens."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise


class Vocabulary:
    """Texts by id.

    Args:
        texts: UTF-8 of each id, possibly part of a character; empty for control tokens and ids without a token.

    Attributes:
        control: Control tokens by their text, such as `<start_of_turn>`.
        vocab_size: Number of ids, with those of added tokens and those without a token.
    """

    def __init__(self, texts: Sequence[bytes], control: Mapping[str, int]) -> None:
        self.control = dict(control)
        # All texts in one bytes object, because 256,000 objects would take ten times the memory.
        self._joined = b"".join(texts)
        self._ends = array("I", accumulate(map(len, texts), initial=0))
        self.vocab_size = len(texts)

    def extend(self, size: int) -> None:
        """Add ids without a token until there are `size`: a model may have more than its tokenizer."""
        more = max(0, size - self.vocab_size)
        self._ends.extend([len(self._joined)] * more)
        self.vocab_size += more

    @staticmethod
    def unpack(packed: bytes, control: Mapping[str, int]) -> Vocabulary:
        """Restore a vocabulary from the result of `pack`. Raises ValueError."""
        size = int.from_bytes(packed[:4], "little")
        ends = array("I", packed[4 : 4 + 4 * (size + 1)])
        joined = packed[4 + 4 * (size + 1) :]
        if len(ends) != size + 1 or ends[0] or ends[-1] != len(joined) or any(a > b for a, b in pairwise(ends)):
            raise ValueError("not a packed vocabulary")
        made = Vocabulary((), control)
        made._joined, made._ends, made.vocab_size = joined, ends, size
        return made

    def pack(self) -> bytes:
        """Return the texts as bytes, for another process on this machine."""
        return self.vocab_size.to_bytes(4, "little") + self._ends.tobytes() + self._joined

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's text in an answer: UTF-8, possibly part of a character; empty for control tokens."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        return self._joined[self._ends[token_id] : self._ends[token_id + 1]]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of an answer's ids, without control tokens."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def saying(self, token_ids: Sequence[int], text: str) -> tuple[int, ...] | None:
        """Return the prefix of `token_ids` that decodes to `text`, byte for byte and without a control token.

        None if there is no such prefix; the text must then be encoded for a prompt.
        """
        wanted, at = text.encode("utf-8", "surrogatepass"), 0
        for count, token_id in enumerate(token_ids):
            if at == len(wanted):
                return tuple(token_ids[:count]) or None
            piece = self.token_bytes(token_id)
            if not piece or not wanted.startswith(piece, at):
                return None
            at += len(piece)
        return tuple(token_ids) if wanted and at == len(wanted) else None


class Detokenizer:
    """Text from token ids as they arrive; an incomplete character is held back until it is complete or proves invalid.

    Bytes that are not UTF-8 become U+FFFD, as does an incomplete character at the end of the answer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._held = b""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty inside a character and for control tokens."""
        data = self._held + self._vocabulary.token_bytes(token_id)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """Return U+FFFD if the ids ended inside a character, else ""."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")
