"""Signs, short of proof, that an adapter does not belong to a base: notes for the user who combines the two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from rkconvert.adapters.base_names import is_other_base
from rkconvert.adapters.reader import Adapter
from rkconvert.model.added_tokens import added_tokens
from rkconvert.model.chat_template import find_template
from rkconvert.sources.checkpoint import Checkpoint
from rkconvert.sources.hub import is_hub_id
from rkconvert.tensors.memory_folder import Place
from rkconvert.tensors.shards import read_json
from rkruntime.bundle.manifest import MAX_TOKENIZER, TOKENIZER
from rkruntime.errors import AdapterError, CheckpointError, InputError
from rkruntime.printable import printable
from rkruntime.text.template import GEMMA

_T = TypeVar("_T", dict[str, Any], list[Any])


def adapter_notes(adapter: Adapter, base: Checkpoint, tokenizer: Place, rows: int) -> Iterator[str]:
    """Yield notes for the user on an adapter on this base.

    Args:
        tokenizer: Folder whose tokenizer and chat template are used.
        rows: Size of the merged model's vocabulary.

    Raises:
        AdapterError, CheckpointError: Its tokenizer or chat template is damaged.
    """
    yield from adapter.notes
    config, names = base.config, (base.name, base.path.name, str(base.raw_config.get("_name_or_path") or ""))
    if is_other_base(adapter.base_name, config.family, config.size_name, names):
        yield (
            f"the adapter {adapter.name} names {_public(adapter.base_name)} as its base, but this is {base.name}"
            f" ({config.family} {config.size_name}): on a model other than its own it gives different answers"
        )
    if adapter.path == tokenizer:
        return
    used = "the model's own" if tokenizer is base.path else "another adapter's"
    path = adapter.path / TOKENIZER
    if path.is_file() and (count := token_count(path)) > rows:
        yield (
            f"the adapter {adapter.name} has a tokenizer of {count:,} tokens, but neither it nor the model has rows for"
            f" more than {rows:,}: the tokens beyond them are lost, and {used} tokenizer is used"
        )
    elif path.is_file() and _is_another(path, tokenizer / TOKENIZER):
        yield f"the adapter {adapter.name} has a different tokenizer.json, which is not used; {used} is"
    own, template = find_template(adapter.path), find_template(tokenizer)
    if own is not None and own.removesuffix("\n") != (GEMMA if template is None else template).removesuffix("\n"):
        yield (
            f"the adapter {adapter.name} has a different chat template, which is not used; {used} is. If it was trained"
            " with its own, it may answer worse"
        )


def _public(name: str) -> str:
    """Return a base's name to show; for a path only its last part, so that notes do not reveal directories."""
    return printable(name if is_hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1])


def _is_another(path: Path, used: Place) -> bool:
    return used.is_file() and _tokens(path, AdapterError) != _tokens(used, CheckpointError)


def token_count(path: Path) -> int:
    """Return one more than the largest token id of an adapter's tokenizer.json; 0 if its format is unknown."""
    tokens = _tokens(path, AdapterError)
    ids = [*tokens["vocab"].values(), *tokens["added"].values()]
    return 1 + max((at for at in ids if type(at) is int), default=-1)


def _tokens(path: Place, kind: type[InputError]) -> dict[str, Any]:
    """Return the parts of tokenizer.json that determine its results, in a common form; empty if of unknown form."""
    content = read_json(path, kind, limit=MAX_TOKENIZER)
    model = _if_a(dict, content.get("model"))
    merges = _if_a(list, model.get("merges"))
    return {
        "vocab": _if_a(dict, model.get("vocab")),
        # Written as "a b" until 2024, and as ["a", "b"] since.
        "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in merges],
        "added": {token["content"]: token["id"] for token in added_tokens(content, path.parent, kind)},
        "normalizer": content.get("normalizer"),
    }


def _if_a(kind: type[_T], value: Any) -> _T:
    return value if isinstance(value, kind) else kind()
