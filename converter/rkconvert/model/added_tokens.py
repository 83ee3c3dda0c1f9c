"""Added tokens of a tokenizer, including those that only other files of its folder than tokenizer.json name.

transformers (5, tokenization_utils_tokenizers.py and tokenization_utils_base.py) adds to tokenizer.json what
tokenizer_config.json, or before it special_tokens_map.json and added_tokens.json, name, and so does this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

from rkconvert.tensors.memory_folder import Place
from rkconvert.tensors.shards import read_json, refuse_versions
from rkruntime.bundle.manifest import MAX_TOKENIZER, TEMPLATE
from rkruntime.errors import BundleError, CheckpointError, InputError

CONFIG: Final = "tokenizer_config.json"
_MAP: Final = "special_tokens_map.json"
_SPLIT: Final = "split_special_tokens"
_DECODER: Final = "added_tokens_decoder"
# A list of further special tokens or a mapping of named ones, and its name before transformers 5.
_EXTRA: Final = "extra_special_tokens"
_EXTRA_BEFORE: Final = "additional_special_tokens"
# Special tokens in the order in which transformers adds them; those with other names follow.
_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokens that transformers' class for Gemma adds on its own (GemmaTokenizer's defaults).
_GEMMAS: Final = ("<bos>", "<eos>", "<unk>", "<pad>", "<mask>")
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Limits on added tokens, of which Gemma 3 has 6,415, and on their characters: the library builds its matcher from them,
# which for this many takes some seconds and 100 MB.
_MAX_ADDED: Final = 1 << 16
_MAX_TEXT: Final = 1 << 19


def tokenizer_config(folder: Place, kind: type[InputError] = CheckpointError) -> dict[str, Any]:
    """Return tokenizer_config.json, empty if there is none.

    Raises:
        InputError: (of class `kind`) It cannot be read, or names other files than tokenizer.json.
    """
    settings = _json(folder / CONFIG, kind)
    refuse_versions(folder / CONFIG, settings, "fast_tokenizer_files", kind)
    return settings


def tokenizer_settings(folder: Place, kind: type[InputError] = CheckpointError) -> dict[str, Any]:
    """Return tokenizer_config.json, with special_tokens_map.json over an older one; empty if there is neither.

    Raises:
        InputError: (of class `kind`) One of them is not a JSON object.
    """
    settings = _settings(folder, kind)
    if _DECODER not in settings and _EXTRA not in settings:
        settings[_EXTRA] = settings.get(_EXTRA_BEFORE)
    return settings


def _settings(folder: Place, kind: type[InputError]) -> dict[str, Any]:
    """Return the settings, in which the list of further special tokens may still have its older name."""
    settings = tokenizer_config(folder, kind)
    older = {} if _DECODER in settings else _json(folder / _MAP, kind)
    _refuse_ambiguous(settings, older, folder / CONFIG, kind)
    if _EXTRA_BEFORE in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop(_EXTRA_BEFORE)
    settings = _with_named(settings)
    if _DECODER in settings:
        return settings
    if isinstance(older.get(_EXTRA), list):
        older[_EXTRA] = [*_extra(settings), *older[_EXTRA]]
    return _with_named(settings | older)


def _refuse_ambiguous(
    settings: Mapping[str, Any], older: Mapping[str, Any], path: Place, kind: type[InputError]
) -> None:
    """Refuse what transformers reads in ways that prompts here do not follow."""
    before = path.parent / _MAP
    if "chat_template" in older:
        raise kind(
            f"{before} has a chat_template, which transformers 5 takes in place of any other.",
            hint=f"Move it to {TEMPLATE}, or remove that key.",
        )
    splitting = next((file for file, found in ((path, settings), (before, older)) if found.get(_SPLIT)), None)
    if splitting is not None:
        raise kind(
            f"{splitting} sets {_SPLIT}, with which not even <start_of_turn> would be one token.",
            hint="Remove that key, and save the tokenizer again.",
        )
    table = settings.get(_EXTRA)
    for name, token in table.items() if isinstance(table, dict) else ():
        if not name.endswith("_token") or (name in older and text_of(older[name]) != text_of(token)):
            raise kind(
                f"{path} names the special token {name[:80]!r} in its table {_EXTRA}, but no name there may lack the"
                " ending _token, or stand for another text in special_tokens_map.json.",
                hint=f"Write the texts into a list {_EXTRA}, and save the tokenizer again.",
            )


def _with_named(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with a table of named special tokens dissolved into entries by name."""
    if not isinstance(table := settings.get(_EXTRA), dict):
        return settings
    rest = {name: value for name, value in settings.items() if name != _EXTRA}
    return rest | {name: value for name, value in table.items() if name.endswith("_token")}


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    found = settings.get(_EXTRA)
    return found if isinstance(found, list) else []


def named_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return special tokens by name, such as `eos_token`: each a text or a mapping with its `content`."""
    order = dict.fromkeys((*_NAMES, *settings))
    return {
        name: settings[name] for name in order if name.endswith("_token") and text_of(settings.get(name)) is not None
    }


def text_of(token: Any) -> str | None:
    """Return the text of a token given as such or as a mapping; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def added_tokens(
    content: Mapping[str, Any], folder: Place, kind: type[InputError] = CheckpointError
) -> list[dict[str, Any]]:
    """Return added tokens of a tokenizer.json and of the files next to it, by id, as those files declare them.

    A token without a declared id gets the next one. Only JSON is read; `agreed_tokens` asks the library.

    Args:
        content: The file's JSON.

    Raises:
        InputError: (of class `kind`) A file cannot be read.
    """
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    vocab = vocab if isinstance(vocab, dict) else {}
    try:
        own = _own(content)
        ids, tokens = _declared(own, folder, kind)
        ids = {token["content"]: token["id"] for token in own} | ids
        following = max([len(vocab), *(index + 1 for index in ids.values())])
        for token in tokens:
            index = ids.setdefault(token["content"], vocab.get(token["content"], following))
            following = max(following, index + 1)
        whole = {token["content"]: token for token in (*own, *tokens)}
        return sorted(({**token, "id": ids[text]} for text, token in whole.items()), key=itemgetter("id"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise kind(f"{folder} has added tokens of an unknown form: {error!r}.") from error


def agreed_tokens(content: Mapping[str, Any], folder: Place) -> list[dict[str, Any]]:
    """Return `added_tokens`, if the library gives each the same id and flags however the folder is loaded.

    Args:
        content: JSON of a tokenizer.json that works like Gemma's: the library runs it, in this process.

    Raises:
        CheckpointError: Ids or flags depend on how the folder is loaded, or a file cannot be read.
    """
    whole = added_tokens(content, folder)
    size = sum(len(token["content"]) for token in whole)
    if len(whole) > _MAX_ADDED or size > _MAX_TEXT:
        raise CheckpointError(
            f"{folder} has {len(whole):,} added tokens with {size:,} characters; at most {_MAX_ADDED:,} with"
            f" {_MAX_TEXT:,} are allowed."
        )
    own = _own(content)
    known = {token["content"]: token for token in whole}
    rebuilt = [known[token["content"]] for token in _declared(own, folder, CheckpointError)[1]]
    # The library and transformers' general class add the file's tokens in the file's order, then the others. Its class
    # for Gemma takes only the vocabulary from the file, and adds those that are declared. A bundle has all, by id.
    for way in (own, rebuilt, whole):
        loaded = _loaded(_without_merges(content, way), str(folder))
        for token in way:
            if loaded.get(token["content"]) != token:
                raise _contradiction(folder, token, loaded.get(token["content"]))
    return whole


def unlisted(file: Place) -> list[str]:
    """Return the added tokens of a tokenizer.json that the list in its tokenizer_config.json, if any, leaves out.

    transformers 5 takes only the listed ones if its class for Gemma reads the folder, and splits the others.

    Raises:
        CheckpointError: A file cannot be read.
    """
    settings = tokenizer_settings(file.parent)
    if _DECODER not in settings:
        return []
    own = _own(read_json(file, CheckpointError, limit=MAX_TOKENIZER))
    _, listed = _declared(own, file.parent, CheckpointError)
    named = [text_of(token) for token in (*named_tokens(settings).values(), *_extra(settings))]
    known = {*_GEMMAS, *named, *(token["content"] for token in listed)}
    return [token["content"] for token in own if token["content"] not in known]


def _contradiction(folder: Place, token: Mapping[str, Any], loaded: Mapping[str, Any] | None) -> CheckpointError:
    text, index = token["content"][:80], token["id"]
    got = "none" if loaded is None else loaded["id"]
    what = f"the id {index}, but with its tokenizer.json it gets {got}" if got != index else "two sets of flags"
    return CheckpointError(
        f"{folder} gives the added token {text!r} {what}.",
        hint="Save the tokenizer again with transformers, or copy it anew from where the model was trained.",
    )


def _without_merges(content: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a tokenizer.json with `added` as its added tokens, and without merges, on which no id depends."""
    whole = {**content, "truncation": None, "padding": None, "added_tokens": added}
    return json.dumps({**whole, "model": {**content["model"], "merges": []}}).encode()


@lru_cache(maxsize=4)
def _loaded(data: bytes, where: str) -> dict[str, dict[str, Any]]:
    """Return the added tokens by text, as the library has them after loading a tokenizer.json."""
    from rkruntime.text.tokenizer import open_backend

    try:
        found = open_backend(data, where).get_added_tokens_decoder()
    except BundleError as error:
        raise CheckpointError(error.message) from error
    flags = {index: {name: getattr(token, name) for name in _FLAGS} for index, token in found.items()}
    return {token.content: {"id": index, "content": token.content, **flags[index]} for index, token in found.items()}


def _own(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens of the file itself, in its order, but none of empty text."""
    tokens = [{"id": token["id"], **_token(token)} for token in content.get("added_tokens") or []]
    if wrong := next((token["id"] for token in tokens if type(token["id"]) is not int), None):
        raise TypeError(f"an added token has the id {str(wrong)[:80]}")
    return [token for token in tokens if token["content"]]


def _declared(
    own: Iterable[Mapping[str, Any]], folder: Place, kind: type[InputError]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return the declared ids by text, and all tokens in the order in which transformers adds them."""
    settings = tokenizer_settings(folder, kind)
    named = named_tokens(settings)
    more = _extra(settings)
    table: dict[int, dict[str, Any]]
    if _DECODER in settings:
        table = {int(index): _token(token) for index, token in settings[_DECODER].items()}
    else:
        older = _json(folder / "added_tokens.json", kind)
        # A list under its older name does not make its tokens special here.
        special = {text_of(token) for token in (*named.values(), *_extra(_settings(folder, kind)))}
        table = {
            int(index): _token({"content": text, "special": text in special, "normalized": text not in special})
            for text, index in older.items()
        }
        table |= {token["id"]: _token(token) for token in own}
    ids = {token["content"]: index for index, token in table.items()}
    names = {text_of(token) for token in named.values()}
    tokens = {token["content"]: token for token in (table[index] for index in sorted(table))}
    known = {token["content"] for token in own} | set(tokens)
    # A special token that has an entry keeps its behavior, and only its name makes it special. Of two others, the last
    # counts.
    for given in (*named.values(), *more):
        text = text_of(given)
        if text and text not in known:
            tokens[text] = _token(given if isinstance(given, dict) else {"content": text, "special": True})
    return ids, [{**token, "special": token["special"] or text in names} for text, token in tokens.items() if text]


def _token(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text and flags of a token, with transformers' defaults."""
    text, special = given["content"], bool(given.get("special", False))
    if not isinstance(text, str):
        raise TypeError(f"an added token is {str(text)[:80]}")
    flags = {name: bool(given.get(name, name == "normalized" and not special)) for name in _FLAGS}
    return {"content": text, **flags, "special": special}


def _json(file: Place, kind: type[InputError]) -> dict[str, Any]:
    return read_json(file, kind) if file.is_file() else {}
