"""What a chat with a model and its adapters needs: its tokenizer, its template and its end tokens."""

from __future__ import annotations

from rkconvert.adapters.merged_model import MergedModel
from rkconvert.model.added_tokens import named_tokens, text_of, tokenizer_settings
from rkconvert.model.chat_template import ChatTemplate, read_template
from rkconvert.model.tokenizer import TokenizerTables, read_tokenizer
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.errors import CheckpointError
from rkruntime.printable import printable
from rkruntime.text.template import BOS, END_OF_TURN


def read_chat(model: MergedModel) -> tuple[TokenizerTables, ChatTemplate]:
    """Read a model's tokenizer and template. Raises CheckpointError or HostError if they cannot be used."""
    folder, config = model.tokenizer_folder, model.weights.config
    tokenizer = read_tokenizer(folder / TOKENIZER, config.vocab_size)
    bos = tokenizer.texts[config.bos_token_id].decode("utf-8", "replace")
    if not bos:
        raise CheckpointError(
            f"config.json: bos_token_id is {config.bos_token_id}, which is not a token of tokenizer.json.",
            hint="In Gemma's own config.json it is 2.",
        )
    own = text_of(named_tokens(tokenizer_settings(folder)).get("bos_token")) or BOS
    if bos not in (own, BOS):
        raise CheckpointError(
            f"config.json: bos_token_id is {config.bos_token_id}, which is the token {printable(bos[:80])!r}, but the"
            f" tokenizer begins texts with {printable(own[:80])}.",
            hint=f"Write the id of that token: {tokenizer.added[own]}." if own in tokenizer.added else None,
        )
    return tokenizer, read_template(folder, bos, model.checkpoint.path)


def stop_tokens(model: MergedModel, tokenizer: TokenizerTables, template: ChatTemplate) -> tuple[int, ...]:
    """Return the checkpoint's end tokens and those that end a turn: generation_config.json often lists only `<eos>`."""
    added = tokenizer.added
    ends = [added[text] for text in (END_OF_TURN, template.special_tokens.get("eos_token")) if text in added]
    return tuple(dict.fromkeys([*model.checkpoint.eos_token_ids, *ends]))
