"""The demo model's tokenizer: BPE with byte fallback, laid out as in Gemma 2's own tokenizer.json.

Gemma's ids are kept for every special token (`<end_of_turn>` is 107); only the vocabulary is smaller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 1024
SPACE = "▁"
PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = 0, 1, 2, 3, 106, 107

CONTROL_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"),
    *(f"<unused{n}>" for n in range(99)),
    *("<start_of_turn>", "<end_of_turn>"),
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

# Gemma 2's template: no system role, strictly alternating turns, "assistant" written as "model".
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set is_users_turn = loop.index0 is even %}"
    "{% if is_users_turn != (message['role'] == 'user') %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def build(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from `texts` and assemble the tokenizer around them.

    Merges stay within a word during training, as in Gemma's vocabulary; Gemma's own splitter, installed afterwards,
    finds no spaces because the normalizer has replaced them.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106  a name
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPACE, "merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^\w▁]|\d"), "isolated"),
        ]
    )
    # Characters outside ASCII are left to the bytes, so that an emoji is several tokens.
    ascii_only = ("".join(filter(str.isascii, text)) for text in texts)
    trainer = BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[*CONTROL_TOKENS, *BYTE_TOKENS], show_progress=False)
    tokenizer.train_from_iterator(ascii_only, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", BOS)])
    # The trainer also made the bytes control tokens; in Gemma's file they are plain entries of the vocabulary.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(CONTROL_TOKENS)]
    return Tokenizer.from_str(json.dumps(content))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the files around it; both transformers 4 and 5 read them."""
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        **special,
        "additional_special_tokens": turns,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**special, "additional_special_tokens": turns})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` in Hugging Face's layout."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
