"""Added tokens of a tokenizer, also those that its folder names only in other files than tokenizer.json.

transformers (5, tokenization_utils_tokenizers.py and tokenization_utils_base.py) adds to tokenizer.json what
tokenizer_config.json, or before it special_tokens_map.json and added_tokens.json, name, and so does this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from rkconvert.tensors.memory_folder import Place
from rkconvert.tensors.shards import read_json
from rkruntime.errors import BundleError, CheckpointError, InputError

if TYPE_CHECKING:
    import tokenizers

CONFIG: Final = "tokenizer_config.json"
_DECODER: Final = "added_tokens_decoder"
# A list of further special tokens or a mapping of named ones, and its name before transformers 5.
_EXTRA: Final = "extra_special_tokens"
_EXTRA_BEFORE: Final = "additional_special_tokens"
# In the order in which transformers adds them; those of other names follow.
_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_settings(folder: Place, kind: type[InputError] = CheckpointError) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json over an older one; empty if there is neither.

    Raises:
        InputError: (of class `kind`) One of them is not a JSON object.
    """
    settings = _json(folder / CONFIG, kind)
    if _EXTRA_BEFORE in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop(_EXTRA_BEFORE)
    if _DECODER in settings:
        return settings
    older = _json(folder / "special_tokens_map.json", kind)
    if isinstance(older.get(_EXTRA), list):
        older[_EXTRA] = [*_extra(settings), *older[_EXTRA]]
    settings |= older
    return {_EXTRA: settings.get(_EXTRA_BEFORE), **settings}


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    found = settings.get(_EXTRA)
    return found if isinstance(found, list) else []


def named_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name, such as `eos_token`: each a text or a mapping with its `content`."""
    extra = settings.get(_EXTRA)
    given = {**settings, **(extra if isinstance(extra, dict) else {})}
    order = dict.fromkeys((*_NAMES, *given))
    return {name: given[name] for name in order if name.endswith("_token") and text_of(given.get(name)) is not None}


def text_of(token: Any) -> str | None:
    """Text of a token given as such or as a mapping; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def added_tokens(content: Mapping[str, Any], path: Place, kind: type[InputError] = CheckpointError) -> Any:
    """The `added_tokens` of a tokenizer.json together with those that other files of its folder name.

    Args:
        content: The file's JSON.

    Returns:
        The file's own value if the other files add and change nothing.

    Raises:
        InputError: (of class `kind`) A file gives a token another id than transformers does, or cannot be read.
    """
    own = content.get("added_tokens") or []
    try:
        ids, tokens = _declared(own, path.parent, kind)
        known = {token["content"]: _token(token) for token in own}
        if all(known.get(token["content"]) == token for token in tokens):
            result: Any = content.get("added_tokens")
            found = {token["content"]: token["id"] for token in own}
        else:
            result = _numbered(path, tokens)
            found = {token["content"]: token["id"] for token in result}
    except BundleError as error:
        raise kind(error.message) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise kind(f"{path} or a file next to it has added tokens of an unknown form: {error!r}.") from error
    for text, index in ids.items():
        if found.get(text) != index:
            raise kind(
                f"{path.parent} gives the added token {text[:80]!r} the id {index}, but with its tokenizer.json "
                f"it gets {found.get(text, 'none')}.",
                hint="Save the tokenizer again with transformers, or copy it anew from where the model was trained.",
            )
    return result


def _declared(
    own: Iterable[Mapping[str, Any]], folder: Place, kind: type[InputError]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Declared ids by text, and all tokens in the order in which transformers adds them."""
    settings = tokenizer_settings(folder, kind)
    named = named_tokens(settings)
    more = _extra(settings)
    special = {text for token in (*named.values(), *more) if (text := text_of(token)) is not None}
    table: dict[int, dict[str, Any]]
    if _DECODER in settings:
        table = {int(index): _token(token) for index, token in settings[_DECODER].items()}
    else:
        older = _json(folder / "added_tokens.json", kind)
        table = {
            int(index): _token({"content": text, "special": text in special, "normalized": text not in special})
            for text, index in older.items()
        }
        table |= {token["id"]: _token(token) for token in own}
    ids = {token["content"]: index for index, token in table.items()}
    names = {text_of(token) for token in named.values()}
    tokens = {token["content"]: token for token in (table[index] for index in sorted(table))}
    known = {token["content"] for token in own}
    # A special token that has an entry keeps its behaviour, and only its name makes it special.
    for given in (*named.values(), *more):
        text = text_of(given)
        if text and text not in known and text not in tokens:
            tokens[text] = _token(given if isinstance(given, dict) else {"content": text, "special": True})
    return ids, [{**token, "special": token["special"] or text in names} for text, token in tokens.items() if text]


def _token(given: Mapping[str, Any]) -> dict[str, Any]:
    """The text and flags of a token, with transformers' defaults."""
    text, special = given["content"], bool(given.get("special", False))
    if not isinstance(text, str):
        raise TypeError(f"an added token is {str(text)[:80]}")
    flags = {name: bool(given.get(name, name == "normalized" and not special)) for name in _FLAGS}
    return {"content": text, **flags, "special": special}


def _numbered(path: Place, tokens: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Added tokens with the ids that the library gives them."""
    from tokenizers import AddedToken

    from rkruntime.text.tokenizer import open_backend

    backend: tokenizers.Tokenizer = open_backend(path.read_bytes(), path)
    for token in tokens:
        backend.add_tokens([AddedToken(**token)])
    found = backend.get_added_tokens_decoder()
    return [
        {"id": index, "content": token.content, **{name: getattr(token, name) for name in _FLAGS}}
        for index, token in sorted(found.items())
    ]


def _json(file: Place, kind: type[InputError]) -> dict[str, Any]:
    return read_json(file, kind) if file.is_file() else {}
