"""The words in which the runtime, the chat and the daemon speak of one run: request, events, result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


class FinishReason(str, Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; defaults are those that every RKLLM manual documents.

    Attributes:
        temperature: 0 takes the most likely token.
        frequency_penalty: -2 to 2.
        mirostat: 0 off, 1 or 2.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    repeat_penalty: float = 1.1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1


GREEDY = Sampling(temperature=0.0, top_k=1, top_p=1.0, repeat_penalty=1.0)


@dataclass(frozen=True)
class Request:
    """One run over token ids.

    Attributes:
        tokens: the whole prompt, template rendered, `<bos>` once.
        max_new_tokens: -1 for as many as the context has room for.
        stop_tokens: each of these ends the answer and is not part of it, also where the runtime knows one EOS only.
        sampling: None keeps what the model was loaded with; another needs release 1.3.0.
        keep_history: continue after what the KV cache holds (1.2.0 on).
        lora: name of an adapter that was loaded before.
        save_prompt_cache: file that the runtime writes after the run.
    """

    tokens: Sequence[int]
    max_new_tokens: int = -1
    stop_tokens: frozenset[int] = field(default_factory=frozenset)
    sampling: Sampling | None = None
    keep_history: bool = False
    lora: str | None = None
    save_prompt_cache: Path | None = None


@dataclass(frozen=True)
class Token:
    """One generated token, as it arrives. `text` is what the runtime said (bytes, maybe part of a character)."""

    token_id: int
    text: bytes = b""


@dataclass(frozen=True)
class Perf:
    """The runtime's own figures (1.2.1 on), times in ms, memory in MB."""

    prefill_ms: float
    prefill_tokens: int
    generate_ms: float
    generate_tokens: int
    memory_mb: float


@dataclass(frozen=True)
class Finished:
    """The last event of a run. `generated_tokens` counts every token of the answer, those inside a character too."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    perf: Perf | None = None


Event = Token | Finished
