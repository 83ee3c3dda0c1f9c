"""Text to token ids and back, over a bundle's tokenizer.json.

A person's text is data: `Tokenizer.encode` never yields a control token, whatever the text says. Control tokens come
from `Tokenizer.control` alone, and only the template puts them anywhere.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import tokenizers

from rkruntime.errors import BundleError

SPACE: Final = "▁"
# Gemma lists ordinary text among its added tokens too: runs of white space and HTML tags. Every other added token is
# taken for a control token, also where the file does not call it special (<unused7>, <mask>, [toxicity=0]).
TEXT_TOKEN: Final = re.compile(
    rf"[\s{SPACE}]+|</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
# Of tokenizer.json: what Gemma's decoder does, and all that `Tokenizer.token_bytes` does.
_DECODERS: Final = frozenset({"Replace", "ByteFallback", "Fuse"})


def _well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD: JSON can say "\\ud800"."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Detokenizer:
    """Text from token ids as they arrive: what is not yet a whole character is kept until it is, or cannot be.

    Bytes that are no UTF-8 come out as U+FFFD, an incomplete character at the end of the answer too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty inside a character and for control tokens."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD if the ids ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A bundle's tokenizer.

    Attributes:
        control: control tokens by their text, such as `<start_of_turn>`.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # Special tokens in a text are then plain text; the non-special control tokens are left to `encode`.
        backend.encode_special_tokens = True
        added: dict[int, tokenizers.AddedToken] = backend.get_added_tokens_decoder()
        self.control = {
            token.content: index
            for index, token in added.items()
            if token.special or not TEXT_TOKEN.fullmatch(token.content)
        }
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._control_ids = frozenset(self.control.values())
        self._bytes = dict.fromkeys(self._control_ids, b"")
        self._control_pattern = re.compile(
            "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or r"(?!)"
        )

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read tokenizer.json.

        Raises:
            BundleError: the file is none, or of a kind that Gemma's models do not have.
        """
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # The library raises nothing narrower.
            raise BundleError(f"{path} is not a tokenizer.json: {error}") from error
        unknown = _decoder_names(backend) - _DECODERS
        if unknown:
            raise BundleError(
                f"{path} decodes by {', '.join(sorted(unknown))}, which no Gemma tokenizer does.",
                hint="Convert the model again from the tokenizer.json of its Gemma checkpoint.",
            )
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without `<bos>`, and never one of a control token."""
        return self._encode(_well_formed(text))

    def _encode(self, text: str) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._control_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return self._byte_ids(text)
        # Cut each control token behind its first character: neither part can be it.
        spans = zip(ids, encoding.offsets, strict=True)
        cuts = {start + 1 for index, (start, _) in spans if index in self._control_ids}
        inside = sorted(cut for cut in cuts if cut < len(text)) or [len(text) // 2]
        return [index for start, end in pairwise([0, *inside, len(text)]) for index in self._encode(text[start:end])]

    def _byte_ids(self, text: str) -> list[int]:
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode())
        return [index for index in ids if index is not None and index not in self._control_ids]

    def split_template(self, text: str) -> list[str | int]:
        """A template's own text as plain texts and the ids of its control tokens. Never for a person's text."""
        parts: list[str | int] = []
        at = 0
        for match in self._control_pattern.finditer(text):
            parts += [text[at : match.start()], self.control[match.group()]]
            at = match.end()
        return [*parts, text[at:]]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in an answer: UTF-8, maybe part of a character; nothing for control tokens."""
        known = self._bytes.get(token_id)
        if known is None:
            text = (self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None) or ""
            byte = _BYTE_TOKEN.fullmatch(text)
            known = bytes.fromhex(byte[1]) if byte else text.replace(SPACE, " ").encode()
            if text:
                self._bytes[token_id] = known
        return known

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of an answer's ids, control tokens left out."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


def _decoder_names(backend: tokenizers.Tokenizer) -> set[str]:
    # The library offers no other view of a loaded decoder than its JSON.
    state: Any = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    return {part["type"] for part in state.get("decoders", [state])}
