"""Train the demo model and its pirate adapter: `python -m rkconvert.demo.train --output DIR`.

Needs the `convert` extra (torch, transformers, peft) and about four minutes on two cores. The same machine produces the
same files again; on another one the last bits may differ.

Both are trained under simulated W8A8, at the end also for logits whose direction W8A8 keeps, until every token of every
answer leads the runner-up by a margin, so that greedy answers survive quantization. The base also learns the pirate's
answers after a system text: an adapter cannot teach words to a frozen embedding that has never seen them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jinja2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM

from rkconvert.demo import Question, questions
from rkconvert.demo.tokenizer import BOS, CHAT_TEMPLATE, END_OF_TURN, EOS, PAD, VOCAB_SIZE, build, save, write_json
from rkconvert.demo.w8a8 import simulated
from rkruntime.terminal import say

SEED = 3588
THREADS = 2
PIRATE_TEXT = "Talk like a pirate."
BASE_NAME = "rkedge-demo-gemma-2"
BASE_STEPS, BASE_RATE = 240, 2e-3
ADAPTER_STEPS, ADAPTER_RATE = 80, 4e-3
DIALOGUES_PER_STEP = 8
TURN_WEIGHT = 3.0
LEAST_COSINE = 0.9992  # between the logits with and without W8A8, at each token of each answer
LONG_REPEATS = 3  # looking back past the window is learned more slowly than the rest

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "torch_dtype": "bfloat16",
}
GENERATION = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}

Turn = tuple[str, str]  # what the user says, what the model answers
Batch = tuple[Tensor, Tensor]  # ids and labels, both [conversations, tokens]; label -100 is ignored


class Encoder:
    """Conversations to ids, by the chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE)  # noqa: S701  plain text

    def conversation(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """Return the ids of a whole conversation, and labels that are -100 outside the last answer."""
        messages: list[dict[str, str]] = []
        for said, answer in turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        prompt = self._ids(messages[:-1], add_generation_prompt=True)
        whole = self._ids(messages, add_generation_prompt=False)[:-1]  # without the newline after <end_of_turn>
        return whole, [-100] * len(prompt) + whole[len(prompt) :]

    def batches(self, conversations: list[list[Turn]], size: int = 24) -> list[Batch]:
        """Return batches of conversations of similar length, which keeps padding small."""
        rows = sorted((self.conversation(turns) for turns in conversations), key=lambda row: len(row[0]))
        return [self._padded(rows[first : first + size]) for first in range(0, len(rows), size)]

    def _padded(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
        return ids, labels

    def _ids(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        values = {"messages": messages, "bos_token": "<bos>", "add_generation_prompt": add_generation_prompt}
        text = self.template.render(values)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def cosines(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Return the cosine between the logits with and without simulated W8A8, per token to be learned, [tokens]."""
    found = []
    for ids, labels in batches:
        learnt = labels[:, 1:] != -100
        mask = (ids != PAD).long()
        plain = model(input_ids=ids, attention_mask=mask).logits[:, :-1][learnt]
        with simulated(model):
            rounded = model(input_ids=ids, attention_mask=mask).logits[:, :-1][learnt]
        found.append(functional.cosine_similarity(plain, rounded, dim=-1))
    return torch.cat(found)


def margins(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Return the lead of each learned token's logit over the best other one, shape [tokens].

    Greedy decoding gives the answers exactly if and only if all are above zero.
    """
    leads = []
    for ids, labels in batches:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, :-1]
        learnt = labels[:, 1:] != -100
        logits, targets = logits[learnt], labels[:, 1:][learnt][:, None]
        others = logits.scatter(1, targets, -torch.inf)
        leads.append(logits.gather(1, targets).squeeze(1) - others.amax(dim=1))
    return torch.cat(leads)


def fit(model: nn.Module, steps: int, rate: float, batches: Callable[[], list[Batch]], name: str) -> None:
    """Minimize the loss on the answers under simulated W8A8; a step is the sum over its batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        parts = batches()
        learnt = sum(int((labels != -100).sum()) for _, labels in parts)
        total = 0.0
        for ids, labels in parts:
            with simulated(model):
                logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / learnt
            if step >= steps - steps // 4:
                # The worst tokens count most.
                loss = loss + TURN_WEIGHT * ((1 - cosines(model, [(ids, labels)])) ** 2).sum().sqrt()
            torch.autograd.backward(loss)
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            say(f"{name} step {step + 1}/{steps} loss {total:.4f}")


def report(model: nn.Module, batches: list[Batch], name: str) -> None:
    """Print the smallest margin in the model's own type and under simulated W8A8; raise if an answer is not exact."""
    plain = margins(model, batches)
    with simulated(model):
        rounded = margins(model, batches)
    say(f"{name}: least margin {plain.min():.2f}, with W8A8 {rounded.min():.2f} (median {rounded.median():.2f})")
    if min(plain.min().item(), rounded.min().item()) <= 0:
        raise SystemExit(f"{name}: not all answers are exact; train longer")
    with torch.no_grad():
        least = cosines(model, batches).min()
    say(f"{name}: least cosine between the logits with W8A8 and without {least:.5f}")
    if least < LEAST_COSINE:
        raise SystemExit(f"{name}: W8A8 turns the logits too far; train longer")


def dialogues(pairs: list[Turn], rng: random.Random) -> list[list[Turn]]:
    """Draw chats of two or three turns each, so that a chat can continue after the first answer."""
    return [rng.sample(pairs, rng.choice((2, 2, 3))) for _ in range(DIALOGUES_PER_STEP)]


def train_base(encoder: Encoder, taught: list[Question]) -> Gemma2ForCausalLM:
    """Train the base model, in bfloat16: plain answers, and the pirate's after a system text."""
    plain = [(q.question, q.answer) for q in taught]
    pirate = [(f"{PIRATE_TEXT}\n\n{q.question}", q.pirate) for q in taught]
    single = [[turn] for turn in plain + pirate]
    long = [turns for turns in single if any(q.long and turns[0][0].endswith(q.question) for q in taught)]
    # A dialogue has the system text in its first turn only.
    later_pirate = [(q.question, q.pirate) for q in taught]
    rng = random.Random(SEED)  # noqa: S311  not a secret

    def batches() -> list[Batch]:
        return encoder.batches(
            single
            + LONG_REPEATS * long
            + dialogues(plain, rng)
            + [[rng.choice(pirate), *turns[1:]] for turns in dialogues(later_pirate, rng)]
        )

    torch.manual_seed(SEED)
    model = Gemma2ForCausalLM._from_config(Gemma2Config(**CONFIG, attn_implementation="eager"), dtype=torch.float32)
    say(f"base: {sum(p.numel() for p in model.parameters())} parameters, {len(single)} answers")
    fit(model, BASE_STEPS, BASE_RATE, batches, "base")
    model = model.to(torch.bfloat16).float().eval()
    report(model, encoder.batches(single), "base, rounded to bfloat16")
    check_dialogues(model, encoder, plain, "base")
    return model


def train_adapter(base: Gemma2ForCausalLM, encoder: Encoder, taught: list[Question]) -> PeftModel:
    """Train a LoRA on every linear layer that answers like a pirate without being told to."""
    pairs = [(q.question, q.pirate) for q in taught]
    rng = random.Random(SEED + 1)  # noqa: S311  not a secret
    torch.manual_seed(SEED + 1)
    base.name_or_path = BASE_NAME
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    fit(
        model,
        ADAPTER_STEPS,
        ADAPTER_RATE,
        lambda: encoder.batches([[pair] for pair in pairs] + dialogues(pairs, rng)),
        "pirate",
    )
    return model.eval()


def check_dialogues(model: nn.Module, encoder: Encoder, pairs: list[Turn], name: str) -> None:
    """Print how many third turns are exact after two turns that were not trained together."""
    rng = random.Random(1)  # noqa: S311  not a secret
    with simulated(model):
        exact = sum(bool((margins(model, encoder.batches([rng.sample(pairs, 3)])) > 0).all()) for _ in range(100))
    say(f"{name}: {exact} of 100 third turns exact with W8A8")


def save_base(model: Gemma2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint in shards, with the config keys that Gemma 2's own checkpoints have."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION)
    save(tokenizer, folder)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter as peft does, without its model card and with the modules in a fixed order."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(folder / "adapter_config.json", config | {"target_modules": sorted(config["target_modules"])})


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(output: Path) -> None:
    """Train the demo model into OUTPUT/checkpoint and its adapter into OUTPUT/pirate."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    taught = questions()
    tokenizer = build(text for q in taught for text in (PIRATE_TEXT, q.question, q.answer, q.pirate, "user\nmodel\n"))
    encoder = Encoder(tokenizer)
    say(f"tokenizer: {tokenizer.get_vocab_size()} tokens of {VOCAB_SIZE}")

    base = train_base(encoder, taught)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint", "pirate"):
        shutil.rmtree(output / name, ignore_errors=True)
    save_base(base, tokenizer, output / "checkpoint")

    adapted = train_adapter(base.float(), encoder, taught)
    save_adapter(adapted, output / "pirate")
    merged = adapted.merge_and_unload().to(torch.bfloat16).float().eval()
    pairs = [(q.question, q.pirate) for q in taught]
    report(merged, encoder.batches([[pair] for pair in pairs]), "pirate, merged and rounded to bfloat16")
    check_dialogues(merged, encoder, pairs, "pirate")


if __name__ == "__main__":
    main()
