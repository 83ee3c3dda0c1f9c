"""Turn text into token ids with a bundle's tokenizer.json.

Users' text is data: `Tokenizer.encode` never returns a control token, whatever the text says. Control tokens come
only from `Tokenizer.control`, and only the template inserts them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, TypeAlias

import tokenizers

from rkruntime.errors import BundleError
from rkruntime.printable import well_formed
from rkruntime.text.vocabulary import Vocabulary

# A part of a prompt: plain text, one control token, or generated ids that are kept as they are.
Part: TypeAlias = str | int | tuple[int, ...]
SPACE: Final = "▁"
# Added tokens are text (runs of white space, HTML tags, words that a fine-tune added) or control tokens, which Gemma's
# file does not always call special: <unused7>, <mask>, [toxicity=0].
_MARKER: Final = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")
_HTML: Final = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
# Limit of ids. Gemma's newest tokenizer has 262,144; gaps between ids are allowed.
_MAX_IDS: Final = 1 << 20
# Limit of a token in characters. Gemma's longest are runs of some dozens of spaces; fine-tunes add words and markers.
_MAX_TOKEN: Final = 1024
# Limit of all tokens together in characters. Gemma's have 2 million.
_MAX_TEXT: Final = 1 << 24

# The parts of a tokenizer.json around its model must be like Gemma's: with any others, texts would get other ids on
# the board from those in training, or single tokens could not be decoded.
_REPLACES_SPACES: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DECODER: Final = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
# Options of BPE, with the values that have no effect.
_IDLE: Final[Mapping[str, Sequence[Any]]] = {
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}


def is_control(text: str, *, special: bool) -> bool:
    """Whether an added token is a control token: never part of a user's text, and not shown in an answer."""
    return special or bool(_MARKER.fullmatch(text) and not _HTML.fullmatch(text))


def unlike_gemma(content: Mapping[str, Any]) -> str | None:
    """Say how a tokenizer.json differs from Gemma's in its effect; None if it does not.

    Truncation and padding, which some trainers leave in the file, are not checked, because they are never applied.

    Args:
        content: The file's JSON; the model's vocab and merges are not needed.
    """
    model, splitter = content["model"], content.get("pre_tokenizer")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return f"it is a {model.get('type')} tokenizer; Gemma's is BPE with byte fallback"
    for name, idle in _IDLE.items():
        if model.get(name) not in idle:
            return f"its BPE has {name} {str(model[name])[:80]!r}; Gemma's has none"
    if _steps(content.get("normalizer"), "normalizers") != [_REPLACES_SPACES]:
        kinds = _kinds(content.get("normalizer"), "normalizers")
        return f"its normalizer is {kinds}; Gemma's replaces spaces by {SPACE} and does nothing else"
    # The normalizer leaves no spaces to split at.
    if splitter is not None and (splitter.get("type") != "Split" or splitter.get("pattern") != {"String": " "}):
        return f"its pre-tokenizer is {_kinds(splitter, 'pretokenizers')}; Gemma's splits at spaces"
    if _steps(content.get("decoder"), "decoders") != _DECODER:
        return f"its decoder is {_kinds(content.get('decoder'), 'decoders')}; Gemma's replaces {SPACE} and joins bytes"
    # The post-processor adds <bos>, but encoding never asks for special tokens.
    if _kinds(content.get("post_processor"), "processors") not in ("none", "TemplateProcessing"):
        return f"its post-processor is {_kinds(content['post_processor'], 'processors')}; Gemma's puts <bos> in front"
    return None


def too_large(tokens: Iterable[str]) -> str | None:
    """Say which limit a tokenizer's tokens, of which answers consist, exceed; None if none."""
    lengths = [*map(len, tokens)]
    if len(lengths) > _MAX_IDS:
        return f"there are {len(lengths):,} tokens; Gemma's have fewer than {_MAX_IDS:,}"
    longest, all_ = max(lengths, default=0), sum(lengths)
    if longest > _MAX_TOKEN:
        return f"a token has {longest:,} characters; at most {_MAX_TOKEN:,} are allowed"
    return f"all tokens have {all_:,} characters; at most {_MAX_TEXT:,} are allowed" if all_ > _MAX_TEXT else None


def _steps(part: Any, key: str) -> list[Any]:
    if part is None:
        return []
    # The library ignores keys that a part's type does not have.
    steps: list[Any] = part[key] if part["type"] == "Sequence" else [part]
    return steps


def _kinds(part: Any, key: str) -> str:
    return ", ".join(str(step.get("type")) for step in _steps(part, key)) or "none"


def open_backend(data: bytes, where: object) -> tokenizers.Tokenizer:
    """Make the library's own tokenizer from the bytes of a tokenizer.json, without truncation and padding.

    Raises:
        BundleError: The file cannot be parsed.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # The library raises nothing narrower, and its panics are not Exceptions.
        raise BundleError(f"{where} is not a tokenizer.json: {str(error)[:500]}") from error
    return backend


class Tokenizer(Vocabulary):
    """A bundle's tokenizer.

    Attributes:
        control: Control tokens by their text, such as `<start_of_turn>`.
        control_pattern: Regular expression that matches each of them.
        longest: Characters in the longest token, at least 1.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # Encode special tokens in a text as plain text; `encode` handles control tokens that are not special.
        backend.encode_special_tokens = True
        added: dict[int, tokenizers.AddedToken] = backend.get_added_tokens_decoder()
        control = {
            token.content: index for index, token in added.items() if is_control(token.content, special=token.special)
        }
        self._greedy = frozenset(
            token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word
        )
        self._control_ids = frozenset(control.values())
        tokens = _by_id(backend)
        if large := too_large(tokens):
            raise BundleError(f"In the tokenizer, {large}.")
        texts = ["" if at in self._control_ids else token for at, token in enumerate(tokens)]
        super().__init__([*map(_bytes, texts)], control)
        self.longest = max(1, *map(len, texts))
        self.control_pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")

    @classmethod
    def parse(cls, data: bytes, where: object) -> Tokenizer:
        """Parse the bytes of a tokenizer.json.

        Args:
            where: The file's path, for messages.

        Raises:
            BundleError: The tokenizer differs from Gemma's.
        """
        backend = open_backend(data, where)
        unlike = unlike_gemma(_state(backend))
        if unlike:
            raise BundleError(
                f"{where}: {unlike}.", hint="Convert the model again from the tokenizer.json of its Gemma checkpoint."
            )
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Return ids of plain text, without `<bos>` and never the id of a control token."""
        return self._encode(well_formed(text))

    def _encode(self, text: str) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._control_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return self._byte_ids(text)
        # Cut each control token after its first character: neither part can be one.
        spans = zip(ids, encoding.offsets, strict=True)
        cuts = {start + 1 for index, (start, _) in spans if index in self._control_ids}
        inside = sorted(cut for cut in cuts if cut < len(text)) or [len(text) // 2]
        return [index for start, end in pairwise([0, *inside, len(text)]) for index in self._encode(text[start:end])]

    def _byte_ids(self, text: str) -> list[int]:
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode())
        return [index for index in ids if index is not None and index not in self._control_ids]

    def split_template(self, text: str) -> list[str | int]:
        """Split a template's own text into plain texts and the ids of its control tokens. Never use it for users' text.

        Raises:
            BundleError: The text has a control token that absorbs adjacent white space, or counts only between spaces.
        """
        parts: list[str | int] = []
        at = 0
        for match in self.control_pattern.finditer(text):
            if match.group() in self._greedy:
                raise BundleError(
                    f"The chat template uses {match.group()}, for which tokenizer.json sets lstrip, rstrip or"
                    " single_word; these are not supported.",
                    hint="Set them to false in tokenizer.json, if the model was trained that way.",
                )
            parts += [text[at : match.start()], self.control[match.group()]]
            at = match.end()
        return [*parts, text[at:]]

    def assemble(self, parts: Sequence[Part]) -> list[int]:
        """Return the ids of a prompt's parts."""
        ids: list[int] = []
        for part in parts:
            ids += self.encode(part) if isinstance(part, str) else (part,) if isinstance(part, int) else part
        return ids


def _by_id(backend: tokenizers.Tokenizer) -> list[str]:
    """Return each token at its id, "" at ids without one, up to the last token: gaps make ids exceed their number."""
    tokens: list[str] = []
    left = backend.get_vocab_size(with_added_tokens=True)
    while left:
        if len(tokens) == _MAX_IDS:
            raise BundleError(
                f"The tokenizer has two tokens of one id, or ids of {_MAX_IDS:,} and more; Gemma's has neither."
            )
        token = backend.id_to_token(len(tokens))
        left -= token is not None
        tokens.append(token or "")
    return tokens


def _bytes(text: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes.fromhex(byte[1]) if byte else text.replace(SPACE, " ").encode()


def _state(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return the JSON of a loaded tokenizer without its vocabulary and merges."""
    # The library exposes these parts only as JSON.
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    loaded = {name: getattr(backend, name) for name in parts}
    model = backend.model
    options = {name: getattr(model, name, None) for name in ("byte_fallback", *_IDLE)}
    state: dict[str, Any] = {name: json.loads(part.__getstate__()) for name, part in loaded.items() if part is not None}
    return state | {"model": {"type": type(model).__name__, **options}}
