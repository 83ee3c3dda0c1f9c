"""What speaks against an adapter on a base, short of a proof: notes for the person who puts the two together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rkconvert.adapter import Adapter
from rkconvert.base_names import is_other_base
from rkconvert.checkpoint import Checkpoint
from rkconvert.hub import is_hub_id
from rkconvert.shards import read_json
from rkruntime.bundle import MAX_TOKENIZER, TOKENIZER
from rkruntime.errors import AdapterError
from rkruntime.printable import printable


def adapter_notes(adapter: Adapter, base: Checkpoint) -> Iterator[str]:
    """What a person must know of an adapter on this base. Raises AdapterError if its tokenizer.json is damaged."""
    yield from adapter.notes
    config, names = base.config, (base.name, base.path.name, str(base.raw_config.get("_name_or_path") or ""))
    if is_other_base(adapter.base_name, config.family, config.size_name, names):
        yield (
            f"the adapter {adapter.name} names {_public(adapter.base_name)} as its base, and this is {base.name}"
            f" ({config.family} {config.size_name}): on another model than its own it gives other answers"
        )
    path = adapter.path / TOKENIZER
    if not adapter.own_tokens and path.is_file() and (count := _token_count(path)) > config.vocab_size:
        yield (
            f"the adapter {adapter.name} has a tokenizer of {count:,} tokens, and neither it nor the model has rows for"
            f" more than {config.vocab_size:,}: the tokens beyond them are lost, and the model's own tokenizer is used"
        )


def _public(name: str) -> str:
    """A base's name to show; of a path the last part only, for where it was is its owner's business."""
    return printable(name if is_hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1])


def _token_count(path: Path) -> int:
    """One more than the largest token id of a tokenizer.json; 0 if it is of another form."""
    content = read_json(path, AdapterError, limit=MAX_TOKENIZER)
    model, added = content.get("model"), content.get("added_tokens")
    ids = (
        list(model.get("vocab", {}).values())
        if isinstance(model, dict) and isinstance(model.get("vocab"), dict)
        else []
    )
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return 1 + max((at for at in ids if type(at) is int), default=-1)
