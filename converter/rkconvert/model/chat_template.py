"""A checkpoint's chat template: found, tried out in a sandbox, and split as needed for the runtime's text prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Final

from rkconvert.model.added_tokens import (
    CONFIG,
    named_tokens,
    text_of,
    tokenizer_config,
    tokenizer_settings,
    unlisted,
)
from rkconvert.model.rendering import rendered, try_out
from rkconvert.model.tokenizer import tokenizer_bytes
from rkconvert.tensors.inputs import templates
from rkconvert.tensors.memory_folder import Place, open_file
from rkconvert.tensors.shards import read_json
from rkruntime.bundle.manifest import MAX_TEMPLATE, TEMPLATE, TOKENIZER
from rkruntime.errors import CheckpointError
from rkruntime.files import read_error
from rkruntime.printable import printable
from rkruntime.text.template import BOS, GEMMA, SPECIAL_TOKENS, Message, fold_system
from rkruntime.words import counted

_MODEL: Final = "config.json"
_USER = "@@the words of the user@@"
# Tokenizer classes: Gemma's own, and those that take tokenizer.json as it is. For any other, transformers 5 makes a
# tokenizer of another kind from the file's vocabulary and merges, where transformers 4 takes the file.
_CLASSES: Final = ("GemmaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_SYSTEMS: Final = ("@@the words of the system@@", "@@other words@@")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and its properties.

    Attributes:
        source: Jinja text.
        own: Whether it came with the checkpoint.
        prefix, suffix: Texts before (without `<bos>`) and after a first user turn.
        system_role: `native` if it renders a system message, else `fold`.
        special_tokens: Texts by the names that the template may use, such as `eos_token`.
        notes: Notes for the user.
    """

    source: str
    own: bool
    prefix: str
    suffix: str
    system_role: str
    special_tokens: Mapping[str, str] = field(default_factory=lambda: SPECIAL_TOKENS)
    notes: tuple[str, ...] = ()

    def messages(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """Return messages for the template; a system message is folded in if the template does not render one."""
        known = messages if self.system_role == "native" else fold_system(messages)
        return [{"role": message.role, "content": message.content} for message in known]

    def prompts(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
        """Render each conversation as the board sees it, up to where the answer starts, with one `<bos>` in front.

        Raises:
            CheckpointError, HostError: See `rendered`.
        """
        bos = self.special_tokens["bos_token"]
        texts = rendered(self.source, conversations, self.special_tokens)
        return [bos + _after_bos(text, bos) if text else "" for text in texts]

    @cached_property
    def ending(self) -> str:
        """The text that every prompt ends with, whatever is in it."""
        turns = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2"), ("user", "3"))]
        short, long = self.prompts([turns[:1], turns])
        same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(short), reversed(long), strict=False))
        # If the template refuses the longer one: the text after its only user turn.
        return short[len(short) - len(list(same)) :] if long else self.suffix


def read_template(folder: Place, bos_token: str, base: Place | None = None) -> ChatTemplate:
    """Load the template of a checkpoint folder, or Gemma's own, and try it with the folder's tokenizer.json, if any.

    Args:
        base: Folder whose template is used if this one, an adapter's, has none.

    Raises:
        CheckpointError: The template cannot be used, or drops the user's words.
        HostError: The process to try it out in cannot be started.
    """
    config = tokenizer_config(folder)
    found, notes = find_template(folder), []
    if found is None and base is not None and (found := find_template(base)) is not None:
        notes.append("the adapter's folder has a tokenizer but no chat template: the base model's is used")
    source = GEMMA if found is None else found
    tokens = {**_undeclared(config), "bos_token": bos_token, **_special_tokens(folder)}
    user = {"role": "user", "content": _USER}
    systems = ([{"role": "system", "content": content}, user] for content in _SYSTEMS)
    text, one, other = rendered(source, [[user], *systems], tokens)
    if text.count(_USER) != 1:
        raise CheckpointError("The chat template does not put the user's words into the prompt exactly once.")
    prefix, suffix = text.split(_USER)
    # A template may alter a system message's text; a message that it drops or refuses is folded in.
    role = "native" if one != other and _USER in one and _USER in other else "fold"
    if (folder / TOKENIZER).is_file():
        try_out(tokenizer_bytes(folder / TOKENIZER), folder / TOKENIZER, source, role, tokens)
    if found is not None and not text.startswith(tokens["bos_token"]):
        notes.append(f"the chat template does not start with {BOS}, which RKEdge puts in front of every prompt")
    notes += _read_otherwise(folder, *_tokenizer_class(folder, config))
    prefix = _after_bos(prefix, tokens["bos_token"])
    return ChatTemplate(source, found is not None, prefix, suffix, role, tokens, tuple(notes))


def _tokenizer_class(folder: Place, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the class that transformers makes a folder's tokenizer of, and the file that names it."""
    model = read_json(folder / _MODEL, CheckpointError) if (folder / _MODEL).is_file() else {}
    for file, settings in ((CONFIG, config), (_MODEL, model)):
        if kind := settings.get("tokenizer_class"):
            return str(kind), file
    return _CLASSES[0], CONFIG


def _read_otherwise(folder: Place, kind: str, named_in: str) -> Iterator[str]:
    """Yield notes on what transformers 5 makes of the tokenizer's files, if that is another tokenizer."""
    but = f"RKEdge, like transformers 4, goes by {TOKENIZER}"
    if kind.removesuffix("Fast") not in _CLASSES:
        yield (
            f"{named_in} names the class {printable(kind[:80])}, with which transformers 5 splits texts otherwise than"
            f" {TOKENIZER} says: {but}"
        )
    elif kind.startswith(_CLASSES[0]) and (folder / TOKENIZER).is_file() and (left := unlisted(folder / TOKENIZER)):
        yield (
            f"{CONFIG} lists added tokens, but not {printable(left[0][:80])} ({counted(len(left), 'such token')}):"
            f" transformers 5 splits what it does not list, and {but}"
        )


def _after_bos(text: str, bos: str) -> str:
    """Remove each `<bos>` that the text begins with, and white space before it, as the runtime does."""
    while bos and (rest := text.lstrip()).startswith(bos):
        text = rest.removeprefix(bos)
    return text


def _special_tokens(folder: Place) -> dict[str, str]:
    """Return the folder's special tokens by name."""
    return {name: str(text_of(token)) for name, token in named_tokens(tokenizer_settings(folder)).items()}


def _undeclared(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the default special tokens: Gemma's for transformers' Gemma class, none for any other."""
    if "Gemma" in str(config.get("tokenizer_class", "Gemma")):
        return SPECIAL_TOKENS
    return dict.fromkeys(SPECIAL_TOKENS, "")


def find_template(folder: Place) -> str | None:
    """Return the template that transformers takes by default: from the files chat_template.jinja and
    additional_chat_templates/*.jinja (since 4.50 and 4.52), else from the key in tokenizer_config.json: a text or a
    named list.

    Raises:
        CheckpointError: A template cannot be read, or there are several and none is the default.
    """
    files = {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    files.update(templates(folder))
    if "default" in files:
        return _read(files["default"])
    found: Any = files or tokenizer_config(folder).get("chat_template")
    if isinstance(found, list):
        found = {str(item.get("name")): item.get("template") for item in found if isinstance(item, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(found)[:200] or "none"
            raise CheckpointError(
                f"{folder} has named chat templates ({names}), but none of them is called default.",
                hint=f"Save the one you want as {TEMPLATE} in that folder.",
            )
        found = found["default"]
    return found if isinstance(found, str) else None


def _read(file: Place) -> str:
    try:
        with open_file(file) as stream:
            data = stream.read(MAX_TEMPLATE + 1)
        if len(data) > MAX_TEMPLATE:
            raise CheckpointError(f"{file} exceeds {MAX_TEMPLATE:,} bytes, too many for a chat template.")
        return data.decode()
    except OSError as error:
        raise read_error(file, error, CheckpointError) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: {error}.") from error
