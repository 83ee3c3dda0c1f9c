"""The types that the runtime, the chat and the daemon share for one run: request, events, result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeAlias

from rkruntime.errors import UsageError
from rkruntime.files import AnyPath, as_path
from rkruntime.schema import Between, check_fields, check_value, types_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Ranges of the sampling fields and their options' help, read by command line, settings and the daemon's interfaces.
# RKLLM's manuals (https://github.com/airockchip/rknn-llm/tree/main/doc, 1.3.0, p. 28-30) give only the ranges of
# mirostat and of the two penalties from -2 to 2; within the others, the emulator takes each value as it is.
Temperature: TypeAlias = Annotated[
    float, Between(0, 10), "Set the sampling temperature; 0 takes the most likely token."
]
TopK: TypeAlias = Annotated[int, Between(1, 1 << 24), "Sample from this many of the most likely tokens."]
TopP: TypeAlias = Annotated[
    float, Between(0, 1), "Sample from the most likely tokens that together have this probability."
]
RepeatPenalty: TypeAlias = Annotated[
    float, Between(0.01, 10), "Penalize tokens that have occurred already; 1 is no penalty."
]
Penalty: TypeAlias = Annotated[float, Between(-2, 2)]
# No answer can be longer than the longest context.
MaxNewTokens: TypeAlias = Annotated[int, Between(1, 1 << 20), "Limit the length of the answer."]
TokenId: TypeAlias = Annotated[int, Between(0, (1 << 31) - 1)]
# Tokens of the context that a prompt must leave free (seen: "max context: 1020" for a context of 1024).
RESERVED: Final = 4


def check_limit(limit: int) -> None:
    """Raise UsageError unless `limit` is a number of new tokens, or -1 for as many as the context has room for."""
    if type(limit) is not int or limit != -1:
        check_value("max_new_tokens", MaxNewTokens, limit)


class FinishReason(str, Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    PAUSE = "pause"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are those in every RKLLM manual.

    Attributes:
        temperature: 0 takes the most likely token.
        mirostat: 0 (off), 1 or 2.

    Raises:
        UsageError: A value is out of range.
    """

    temperature: Temperature = 0.8
    top_k: TopK = 40
    top_p: TopP = 0.9
    repeat_penalty: RepeatPenalty = 1.1
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    mirostat: Annotated[int, Between(0, 2)] = 0
    mirostat_tau: Annotated[float, Between(0, 100)] = 5.0
    mirostat_eta: Annotated[float, Between(0, 1)] = 0.1

    def __post_init__(self) -> None:
        check_fields(self)

    def changed(self, wanted: Mapping[str, Any]) -> Sampling:
        """Return a copy with the fields that a user or a request asks for replaced.

        A temperature or a top_p of 0 takes the most likely token, whatever the other fields say. Which token that is
        depends on the penalties, of which only those asked for count. A temperature above 0 applies on top of the
        defaults, not of GREEDY.
        """
        if wanted.get("temperature") == 0 or wanted.get("top_p") == 0:
            return replace(GREEDY, **{name: value for name, value in wanted.items() if name.endswith("_penalty")})
        base = Sampling() if self == GREEDY and wanted.get("temperature") is not None else self
        return replace(base, **wanted)


DEFAULT_SAMPLING = Sampling()
GREEDY = Sampling(temperature=0.0, top_k=1, top_p=1.0, repeat_penalty=1.0)
# Fields that a request to the daemon may set under the same names; mirostat is fixed when the model is loaded.
PER_REQUEST: Final = tuple(name for name in types_of(Sampling) if not name.startswith("mirostat"))


@dataclass(frozen=True)
class TextPrompt:
    """A text that the runtime tokenizes and, since 1.2.0, wraps in the model's chat template.

    Attributes:
        role: `user`, or `tool` for a tool's result (since 1.2.1).
        enable_thinking: Switch of Qwen3 models (since 1.2.1).
    """

    text: str
    role: str = "user"
    enable_thinking: bool = False


@dataclass(frozen=True)
class EmbeddingPrompt:
    """Embeddings in place of token ids: float32 [tokens, hidden size]."""

    values: NDArray[np.float32]


@dataclass(frozen=True)
class ImagePrompt:
    """A text with images, as encoded by a separate vision model.

    Attributes:
        text: Text with the model's image placeholder where each image belongs.
        images: float32 [images, tokens per image, hidden size].
        width, height: Size of an image in pixels (since 1.2.1b1).
        markers: Texts for start, end and content of an image (per run since 1.3.0; before that, see LoadOptions).
    """

    text: str
    images: NDArray[np.float32]
    width: int = 0
    height: int = 0
    markers: tuple[str, str, str] | None = None


Prompt = TextPrompt | EmbeddingPrompt | ImagePrompt


@dataclass(frozen=True)
class Request:
    """One run, with token ids or another kind of prompt.

    Attributes:
        tokens: The whole prompt, template rendered, `<bos>` once.
        prompt: A prompt of another kind, in place of `tokens`.
        max_new_tokens: Limit of the answer; -1 for as many as the context has room for. An engine does not run 0.
        stop_tokens: Tokens that end the answer and are not part of it, even where the runtime knows only one EOS.
        sampling: Sampling of this run, which requires release 1.3.0; None keeps what the model was loaded with.
        keep_history: Continue after what is in the KV cache (since 1.2.0).
        lora: Name of a loaded adapter; None means LoadOptions.lora, if it is set.
        save_prompt_cache: File that the runtime writes after the run.
        pause_tokens: Tokens that end the run with PAUSE; they are part of the answer, and the KV cache is kept as it is
            for a run that continues (since 1.2.1). One board is reported to ignore the next run's prompt and continue
            this answer: that run ends with a RunError. Another board is reported to crash. RKEdge itself never pauses.

    Raises:
        UsageError: A field has a wrong type or is out of range.
    """

    tokens: Sequence[int] = ()
    max_new_tokens: Annotated[int, Between(-1, 1 << 20)] = -1
    stop_tokens: frozenset[TokenId] = field(default_factory=frozenset)
    sampling: Sampling | None = None
    keep_history: bool = False
    lora: str | None = None
    save_prompt_cache: AnyPath | None = None
    prompt: Prompt | None = None
    pause_tokens: frozenset[TokenId] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for name in ("stop_tokens", "pause_tokens"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        if self.save_prompt_cache is not None:
            object.__setattr__(self, "save_prompt_cache", as_path("save_prompt_cache", self.save_prompt_cache))
        check_fields(self)

    @property
    def length(self) -> int | None:
        """Number of tokens in the prompt; None if only the runtime knows it."""
        if self.prompt is None:
            return len(self.tokens)
        return len(self.prompt.values) if isinstance(self.prompt, EmbeddingPrompt) else None


def _ids(name: str, tokens: Any) -> frozenset[int]:
    """Return token ids from any collection as a frozenset. Raises UsageError if it is not a collection."""
    try:
        return frozenset(tokens)
    except TypeError:
        raise UsageError(f"{name} must be a set of token ids.") from None


class Token(NamedTuple):
    """One generated token. `text` is the runtime's own (bytes, possibly part of a character)."""

    token_id: int
    text: bytes = b""


@dataclass(frozen=True)
class Perf:
    """The runtime's own figures (since 1.2.1), times in ms, memory in MB."""

    prefill_ms: float
    prefill_tokens: int
    generate_ms: float
    generate_tokens: int
    memory_mb: float


@dataclass(frozen=True)
class Finished:
    """The last event of a run. `generated_tokens` also counts tokens that are only part of a character."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    perf: Perf | None = None


Event = Token | Finished


@dataclass(frozen=True)
class Logits:
    """float32 [tokens, vocabulary]: first for the whole prompt, then for each generated token (since 1.2.0)."""

    values: NDArray[np.float32]


@dataclass(frozen=True)
class HiddenStates:
    """The last layer's output, float32 [tokens, hidden size]."""

    values: NDArray[np.float32]


ArrayEvent = Token | Finished | Logits | HiddenStates
