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

try:
    import torch
    from jinja2 import TemplateError
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
except ImportError as missing:
    raise SystemExit(f"{missing}. This needs: pip install torch transformers peft accelerate") from None

# Every linear layer, which `rkedge convert --lora` merges.
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100
# Gemma's own, which `rkedge convert` takes too if a checkpoint (such as google/gemma-2-2b) has none.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
Messages = list[dict[str, str]]


def conversations(path: Path) -> list[Messages]:
    """The conversations of a JSONL file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also cuts at characters inside texts
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = [{"role": item["role"], "content": item["content"]} for item in json.loads(line)["messages"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SystemExit(f'{path}, line {number}: expected {{"messages": [...]}} ({error!r}).') from None
        if not all(isinstance(value, str) for message in messages for value in message.values()):
            raise SystemExit(f"{path}, line {number}: each role and each content must be a text.")
        roles = [message["role"] for message in messages]
        turns = roles[roles[:1] == ["system"] :]
        if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
            raise SystemExit(f"{path}, line {number}: user and assistant must alternate and end with an answer.")
        found.append(messages)
    if not found:
        raise SystemExit(f"{path} has no conversation.")
    return found


class Chat:
    """The checkpoint's chat template, used as RKEdge uses it on a board."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
        asked = {"role": "user", "content": "@@question@@"}
        try:
            one, other = (self.text([{"role": "system", "content": text}, asked]) for text in ("@@one@@", "@@other@@"))
            self.has_system = one != other and all(asked["content"] in text for text in (one, other))
        except TemplateError:
            self.has_system = False

    def text(self, messages: Messages, prompt: bool = True) -> str:
        """A conversation as text, with one <bos> in front, without which Gemma answers badly."""
        bos = self.tokenizer.bos_token or "<bos>"
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        while (rest := text.lstrip()).startswith(bos):
            text = rest.removeprefix(bos)
        return f"{bos}{text}"

    def folded(self, messages: Messages) -> Messages:
        """The conversation with its system message in front of the first question, unless there is a role for it."""
        if self.has_system or messages[0]["role"] != "system":
            return messages
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return [first, *messages[2:]]

    def ids(self, text: str) -> list[int]:
        """Token ids of a part of the text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def rows(self, messages: Messages) -> list[dict[str, list[int]]]:
        """Ids of a conversation, and labels that ignore all but the answers and their ends.

        One row, or several if the template changes earlier answers (many drop the thoughts in them).
        """
        messages, rows, done = self.folded(messages), [], ""
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                if used := next((token for token in self.special if token in message["content"]), None):
                    raise SystemExit(f"A question has the control token {used}, text on a board: leave it out.")
                continue
            prompt, whole = self.text(messages[:at]), self.text(messages[: at + 1], prompt=False).rstrip()
            if not whole.startswith(prompt):
                raise SystemExit(f"The chat template ends prompts with {prompt[-40:]!r}: answers must begin with that.")
            if not rows or not prompt.startswith(done):
                done = ""
                rows.append({"input_ids": [], "labels": []})
            # Apart, as on a board, where an answer begins with a token of its own.
            asked, answer = self.ids(prompt[len(done) :]), self.ids(whole[len(prompt) :])
            if not answer or answer[-1] not in self.tokenizer.added_tokens_decoder:
                raise SystemExit(f"The chat template does not end an answer with a control token: {whole[-40:]!r}")
            rows[-1]["input_ids"] += asked + answer
            rows[-1]["labels"] += [IGNORED] * len(asked) + answer
            done = whole
        return rows


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
    parser.add_argument("-o", "--output", required=True, type=Path, help="new folder for the adapter")
    parser.add_argument("--nf4", action="store_true", help="keep the base model in 4 bits (QLoRA)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (16)")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the data (3)")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate (2e-4)")
    parser.add_argument("--batch", type=int, default=4, help="conversations a step (4)")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a conversation that are used (2048)")
    given = parser.parse_args()
    data = conversations(given.data)
    try:
        given.output.mkdir(parents=True, exist_ok=True)  # before the work, which may take hours
        if any(given.output.iterdir()):
            raise SystemExit(f"{given.output} exists already.")
    except OSError as error:
        raise SystemExit(f"{given.output} cannot be written: {error}") from None
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    chat = Chat(tokenizer)
    rows = [{key: ids[: given.longest] for key, ids in row.items()} for messages in data for row in chat.rows(messages)]
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    print(f"{len(rows)} rows from {len(data)} conversations have an answer within {given.longest} tokens.")
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
    pad = tokenizer.pad_token_id or 0  # any: the mask hides it
    Trainer(model, options, train_dataset=rows, data_collator=lambda batch: padded(batch, pad)).train()
    model.save_pretrained(given.output, save_embedding_layers=False)
    print(f"\nNext: rkedge convert {given.checkpoint} --lora {given.output}")


if __name__ == "__main__":
    main()
