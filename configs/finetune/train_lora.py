"""Train a LoRA for Gemma 2 on conversations: `python train_lora.py CHECKPOINT DATA.jsonl -o ADAPTER`.

Each line of the data is a conversation, {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}.
Only the answers are learnt, and the end of each turn with them. See docs/finetune.md; needs torch, transformers, peft
and accelerate, and bitsandbytes for --nf4.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

# Every linear layer, which `rkedge convert --lora` merges.
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


def conversations(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a JSONL file, with a system message folded into the first user's, as RKEdge does."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)["messages"]
            messages = [{"role": str(item["role"]), "content": str(item["content"])} for item in given]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f'{path}, line {number}: expected {{"messages": [...]}} ({error!r}).') from None
        if len(messages) > 1 and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        roles = [message["role"] for message in messages]
        if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
            raise SystemExit(f"{path}, line {number}: user and assistant must alternate and end with an answer.")
        found.append(messages)
    if not found:
        raise SystemExit(f"{path} has no conversation.")
    return found


def row_of(tokenizer: Any, messages: list[dict[str, str]], longest: int) -> dict[str, list[int]]:
    """Ids of a conversation in the checkpoint's own template, and labels that ignore all but the answers."""

    def ids(upto: int, *, prompt: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=prompt, return_dict=False))

    whole = ids(len(messages), prompt=False)
    labels = [IGNORED] * len(whole)
    for at in range(1, len(messages), 2):
        start, end = len(ids(at, prompt=True)), len(ids(at + 1, prompt=False))
        if not tokenizer.decode(whole[end - 1]).strip():  # the line feed after <end_of_turn>, which nobody generates
            end -= 1
        labels[start:end] = whole[start:end]
    return {"input_ids": whole[:longest], "labels": labels[:longest]}


def padded(rows: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of rows of one length."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", pad), "labels": filled("labels", IGNORED), "attention_mask": mask}


def load(checkpoint: str, nf4: bool) -> Any:
    """The base model; with `nf4` (QLoRA), its matrices in 4 bits."""
    kinds = {"attn_implementation": "eager"}  # the kind that Gemma 2 was trained with: others leave out soft-capping
    if not nf4:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", **kinds)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return prepare_model_for_kbit_training(
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=bits, **kinds)
    )


def main() -> None:
    """Train, and write the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub id of the base model")
    parser.add_argument("data", type=Path, help="conversations, one JSON object a line")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the adapter; must not exist")
    parser.add_argument("--nf4", action="store_true", help="keep the base model in 4 bits (QLoRA)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (16)")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the data (3)")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate (2e-4)")
    parser.add_argument("--batch", type=int, default=4, help="conversations a step (4)")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a conversation that are used (2048)")
    given = parser.parse_args()
    if given.output.exists():
        raise SystemExit(f"{given.output} exists already.")
    data = conversations(given.data)
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    rows = [row_of(tokenizer, messages, given.longest) for messages in data]
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    print(f"{len(rows)} of {len(data)} conversations have an answer within {given.longest} tokens.")
    if not rows:
        raise SystemExit("There is nothing to learn.")
    torch.manual_seed(0)
    lora = LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(load(given.checkpoint, given.nf4), lora)
    model.print_trainable_parameters()
    options = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written: no checkpoints are saved
        per_device_train_batch_size=given.batch,
        num_train_epochs=given.epochs,
        learning_rate=given.rate,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    pad = tokenizer.pad_token_id
    Trainer(model, options, train_dataset=rows, data_collator=lambda batch: padded(batch, pad)).train()
    model.save_pretrained(given.output, save_embedding_layers=False)
    print(f"\nNext: rkedge convert {given.checkpoint} --lora {given.output}")


if __name__ == "__main__":
    main()
