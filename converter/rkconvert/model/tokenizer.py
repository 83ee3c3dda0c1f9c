"""Convert a Gemma tokenizer.json into the tables of a .rkemu file: texts, kinds and merges by id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.model.added_tokens import agreed_tokens
from rkconvert.tensors.memory_folder import Place, open_file
from rkconvert.tensors.shards import read_json
from rkruntime.bundle.manifest import MAX_TOKENIZER
from rkruntime.errors import CheckpointError
from rkruntime.text.tokenizer import is_control, too_large, unlike_gemma

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Kind(IntEnum):
    """Kind of a token, numbered as in docs/rkemu-format.md."""

    NORMAL = 0
    CONTROL = 1
    BYTE = 2
    UNUSED = 3
    USER_DEFINED = 4


class Flag(IntFlag):
    """How an added token is matched in a text, numbered as in docs/rkemu-format.md."""

    NORMALIZED = 1
    LSTRIP = 2
    RSTRIP = 4


@dataclass(frozen=True)
class TokenizerTables:
    """A tokenizer as the tables of a .rkemu file.

    Attributes:
        texts: UTF-8 of each token by id; one raw byte for a byte token, empty for an id without a token.
        kinds: `Kind` by id.
        flags: `Flag`s of added tokens by id, if any.
        single_words: Added tokens that are matched only as whole words.
        merges: Ids of left part, right part and result, by rank; uint32 [n, 3].
    """

    texts: tuple[bytes, ...]
    kinds: tuple[Kind, ...]
    flags: Mapping[int, Flag]
    single_words: tuple[str, ...]
    merges: NDArray[np.uint32]
    unk_token_id: int

    @property
    def added(self) -> dict[str, int]:
        """Ids by text of control tokens and of tokens outside the vocabulary."""
        wanted = (Kind.CONTROL, Kind.USER_DEFINED)
        return {self.texts[at].decode("utf-8", "replace"): at for at, kind in enumerate(self.kinds) if kind in wanted}

    @property
    def padded(self) -> bool:
        """Whether the last rows of the model's embedding have no token: trainers fill it up to a round number."""
        return self.kinds[-1] is Kind.UNUSED

    @cached_property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The tensors `tokenizer.*` of a .rkemu file.

        Raises:
            CheckpointError: The emulator would match an added token differently from the checkpoint's own tokenizer.
        """
        if self.single_words:
            raise CheckpointError(
                f"Its added token {self.single_words[0]!r} matches only as a whole word; the emulator cannot do that.",
                hint="Set its single_word to false in tokenizer.json, or convert with --target toolkit.",
            )
        flags = np.zeros(len(self.texts), np.uint8)
        for at, flag in self.flags.items():
            flags[at] = flag
        lengths = np.fromiter((len(text) for text in self.texts), np.uint32, len(self.texts))
        return {
            "tokenizer.text": np.frombuffer(b"".join(self.texts), np.uint8),
            "tokenizer.offsets": np.concatenate([np.zeros(1, np.uint32), np.cumsum(lengths, dtype=np.uint32)]),
            "tokenizer.kinds": np.array(self.kinds, np.uint8),
            **({"tokenizer.flags": flags} if self.flags else {}),
            "tokenizer.merges": self.merges,
        }


def read_tokenizer(path: Place, vocab_size: int) -> TokenizerTables:
    """Read the tokenizer.json of a model with `vocab_size` embedding rows.

    Raises:
        CheckpointError: No such file, or a tokenizer that works differently from Gemma's.
    """
    content = _read(path)
    whole = {**content, "added_tokens": agreed_tokens(content, path.parent)}
    with _named(path):
        return _tables(whole, vocab_size)


def tokenizer_bytes(path: Place) -> bytes:
    """Return `tokenizer_json` for a bundle: the file itself if there is nothing to change. Raises CheckpointError."""
    content = _read(path)
    whole = _whole(content, path)
    unchanged = all(content.get(key) == value for key, value in whole.items())
    if not unchanged:
        return json.dumps(whole).encode()
    with open_file(path) as file:
        return file.read()


def tokenizer_json(path: Place) -> dict[str, Any]:
    """Return a tokenizer.json with the added tokens that only the files next to it name, and without the truncation and
    padding that trainers leave in it.

    Raises:
        CheckpointError: See `read_tokenizer`; or the files contradict each other.
    """
    return _whole(_read(path), path)


def _whole(content: Mapping[str, Any], path: Place) -> dict[str, Any]:
    return {**content, "truncation": None, "padding": None, "added_tokens": agreed_tokens(content, path.parent)}


def _read(path: Place) -> dict[str, Any]:
    """Read the JSON of a tokenizer.json that works like Gemma's and is of a similar size.

    Everything passes here before the library, which has no limits of its own, sees it.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}.",
            hint="Take tokenizer.json from the model that this one was made from; fine-tuning scripts may not copy it.",
        )
    content = read_json(path, CheckpointError, limit=MAX_TOKENIZER)
    with _named(path):
        if unlike := unlike_gemma(content):
            raise CheckpointError(f"{unlike}.")
        added = [token["content"] for token in content.get("added_tokens") or []]
        if large := too_large({**content["model"]["vocab"], **dict.fromkeys(added)}):
            raise CheckpointError(f"{large}.")
    return content


@contextmanager
def _named(path: Place) -> Iterator[None]:
    """Put the file's path in front of errors, and turn what an unknown form raises into a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the `tokenizers` library: {error!r}.") from error


def bos_in_front(bos: str, index: int) -> dict[str, Any]:
    """Return the post-processor that puts `<bos>` in front of each text, as Gemma's does."""
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            special,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _tables(content: Mapping[str, Any], vocab_size: int) -> TokenizerTables:
    model = content["model"]
    vocab: dict[str, int] = model["vocab"]
    added = {token["content"]: token for token in content["added_tokens"]}
    ids = vocab | {text: token["id"] for text, token in added.items()}
    texts, kinds = [b""] * vocab_size, [Kind.UNUSED] * vocab_size
    taken: dict[int, str] = {}
    for text, index in ids.items():
        if type(index) is not int or not 0 <= index < vocab_size:
            raise CheckpointError(f"the token {text!r} has the id {index!r}, but the model has {vocab_size} tokens.")
        if (other := taken.setdefault(index, text)) != text:
            raise CheckpointError(f"the tokens {other!r} and {text!r} both have the id {index}.")
        kinds[index] = _kind(text, added.get(text))
        byte = _BYTE.fullmatch(text)
        texts[index] = bytes([int(byte[1], 16)]) if byte else text.encode()
    # transformers writes Gemma's token <0x09> as the tab itself (GemmaConvert in convert_slow_tokenizer.py).
    spelled = ({f"<0x{byte:02X}>", *([chr(byte)] if byte < 128 else [])} for byte in range(256))
    usable = {text for text in vocab if kinds[vocab[text]] is not Kind.CONTROL}
    if any(usable.isdisjoint(spellings) for spellings in spelled):
        raise CheckpointError("it does not have a token for every byte, so some characters could not be encoded.")
    flags = {token["id"]: _flags(token) for token in added.values()}
    flags = {index: flag for index, flag in flags.items() if flag}
    single_words = tuple(text for text, token in added.items() if token["single_word"])
    return TokenizerTables(
        tuple(texts), tuple(kinds), flags, single_words, _merges(model["merges"], vocab), ids[model["unk_token"]]
    )


def _kind(text: str, added: Mapping[str, Any] | None) -> Kind:
    if _BYTE.fullmatch(text):
        return Kind.BYTE
    if added is None:
        return Kind.NORMAL
    return Kind.CONTROL if is_control(text, special=bool(added.get("special"))) else Kind.USER_DEFINED


def _flags(added: Mapping[str, Any]) -> Flag:
    return Flag(sum(flag for flag in Flag if added.get(str(flag.name).lower())))


def _merges(merges: list[Any], vocab: Mapping[str, int]) -> NDArray[np.uint32]:
    """Return merges as ids; files have them as "a b" until 2024, and as ["a", "b"] since."""
    table = np.empty((len(merges), 3), np.uint32)
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        table[rank] = vocab[left], vocab[right], vocab[left + right]
    return table
