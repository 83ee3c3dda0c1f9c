"""`--verify`: the toolkit's own logits of a few prompts, after quantization, beside those of the float model.

The float model is computed after the toolkit has ended, block by block from the weights that it was given: the two are
never in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.adapters.merge import MergedWeights
from rkconvert.calibrate.dataset import TokenCounter, validate_dataset
from rkconvert.model.float_model import FloatModel
from rkconvert.output.paths import without_paths
from rkconvert.progress import Advance
from rkconvert.target import ModelSpec
from rkconvert.toolkit.job import LAST_ROWS
from rkconvert.toolkit.options import ToolkitOptions
from rkconvert.toolkit.result import ToolkitResult
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.errors import RKEdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Prompts of several kinds, used if calibration data has too few.
_QUESTIONS: Final = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "为什么天空是蓝色的？",
)
# A longer prompt costs time and says no more.
_MOST_TOKENS: Final = 256
_TOP: Final = 5
_MOST_PROBLEM: Final = 300
# Limits of a credible file, worse than two bits for each weight: LLaMA 3 8B has 0.45 nats and 71 % with q2_K, 0.001
# and 98 % with 8 bits (https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md).
_MOST_KL: Final = 0.5
_LEAST_AGREEMENT: Final = 0.5


@dataclass(frozen=True)
class Comparison:
    """The toolkit's logits of one prompt beside the float model's.

    Attributes:
        tokens, positions: Length of the prompt, and how many positions at its end were compared.
        agreement: Share of these positions whose likeliest token is the same.
        kl: Kullback-Leibler divergence of the toolkit's distribution from the float model's, in nats, on average.
        expected, found: The likeliest ids of the answer's first token: the float model's, and the toolkit's.
    """

    tokens: int
    positions: int
    agreement: float
    kl: float
    expected: tuple[int, ...]
    found: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, expected: Floats, found: Floats) -> Comparison:
        """Compare two arrays of logits, [positions, vocabulary]."""
        same = expected.argmax(axis=1) == found.argmax(axis=1)
        ours, theirs = _log_shares(expected), _log_shares(found)
        kl = (np.exp(ours) * (ours - theirs)).sum(axis=1).mean()
        return cls(tokens, len(expected), float(same.mean()), max(0.0, float(kl)), _top(expected), _top(found))

    def __str__(self) -> str:
        return (
            f"{self.agreement:.0%} of {self.positions} likeliest tokens agree, KL {self.kl:.3g} nats;"
            f" first token {self.found[0]} (float model: {self.expected[0]})"
        )


@dataclass(frozen=True)
class Verified:
    """The outcome of the comparison.

    Attributes:
        problem: Why there is no comparison; empty if there is one.
        model: What the toolkit's logits were closest to: `base`, or `adapter` for the model with the one that became a
            separate file.
    """

    comparisons: tuple[Comparison, ...] = ()
    problem: str = ""
    model: str = "base"

    @property
    def kl(self) -> float:
        """Mean divergence over the prompts, in nats."""
        return float(np.mean([item.kl for item in self.comparisons]))

    @property
    def agreement(self) -> float:
        """Mean agreement over the prompts."""
        return float(np.mean([item.agreement for item in self.comparisons]))

    @property
    def doubt(self) -> str:
        """Reason to doubt the file; empty if there is none."""
        worst = max((item.kl for item in self.comparisons), default=0.0)
        if not self.comparisons or (self.agreement >= _LEAST_AGREEMENT and worst <= _MOST_KL):
            return ""
        return (
            f"its own logits are not those of this model: {self.agreement:.0%} of the likeliest tokens agree, KL up to"
            f" {worst:.2g} nats, worse than two bits for each weight explain; a head or a cap may be lost, or the"
            " prompt changed"
        )

    def lines(self) -> list[str]:
        """Return a line for each prompt, for the user."""
        if self.problem:
            return [f"verify: there is nothing to compare, {self.problem}"]
        adapter = " (with the adapter)" if self.model == "adapter" else ""
        return [f"verify: prompt {number}{adapter}: {item}" for number, item in enumerate(self.comparisons, start=1)]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON types."""
        prompts = [
            {**vars(item), "expected": list(item.expected), "found": list(item.found)} for item in self.comparisons
        ]
        return {"problem": self.problem, "model": self.model, "prompts": prompts}


def choose_prompts(spec: ModelSpec, options: ToolkitOptions) -> tuple[tuple[int, ...], ...]:
    """Return the ids of three prompts in the model's template: the calibration data's, else RKEdge's own; none if
    `verify` is off.
    """
    if not options.verify:
        return ()
    count = TokenCounter(spec.model.tokenizer_folder / TOKENIZER)
    chats = [[{"role": "user", "content": text}] for text in _QUESTIONS]
    texts = spec.template.prompts(chats)
    if options.calibration:
        texts = [*(row.input for row in validate_dataset(options.calibration)), *texts]
    bos, most = spec.config.bos_token_id, min(_MOST_TOKENS, spec.max_context)
    ids = [count.encode(text) for text in texts if text]
    prompts = [tuple(found if found[:1] == [bos] else [bos, *found]) for found in ids]
    return tuple(prompt for prompt in prompts if len(prompt) <= most)[: len(_QUESTIONS)]


def needed_reads(spec: ModelSpec) -> int:
    """Return the bytes of weights that `verify` reads."""
    return spec.model.nbytes * (2 if spec.lora else 1)


def verify(result: ToolkitResult, spec: ModelSpec, prompts: Sequence[Sequence[int]], advance: Advance) -> Verified:
    """Compare the toolkit's logits with the float model's. What cannot be compared is reported, and is not an error.

    Args:
        advance: Called with the bytes of each block of weights read.
    """
    if not prompts:
        return Verified(problem="every prompt is longer than the context")
    found, problem = _rows(result, prompts, spec.config.vocab_size)
    if problem:
        return Verified(problem=problem)
    try:
        return min((_compared(name, model, prompts, found) for name, model in _models(spec, advance)), key=_distance)
    except (RKEdgeError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else without_paths(error.message)
        return Verified(problem=f"the float model cannot be computed: {why}")


def _compared(name: str, model: FloatModel, prompts: Sequence[Sequence[int]], found: Sequence[Floats]) -> Verified:
    with np.errstate(all="ignore"):
        expected = model.logits(prompts, LAST_ROWS)
    if not all(np.isfinite(rows).all() for rows in expected):
        return Verified(problem="the float model's logits are not finite", model=name)
    pairs = zip(prompts, expected, found, strict=True)
    return Verified(tuple(Comparison.of(len(ids), ours, theirs) for ids, ours, theirs in pairs), model=name)


def _distance(verified: Verified) -> float:
    return verified.kl if verified.comparisons else np.inf


def _models(spec: ModelSpec, advance: Advance) -> Iterator[tuple[str, FloatModel]]:
    """Yield what the toolkit may have computed: whether its logits include a separate adapter is not documented."""
    yield "base", FloatModel(spec.model.weights, spec.config, advance)
    if spec.lora is not None:
        checkpoint = spec.model.checkpoint
        yield (
            "adapter",
            FloatModel(MergedWeights(checkpoint.weights, checkpoint.config, (spec.lora,)), spec.config, advance),
        )


def _rows(result: ToolkitResult, prompts: Sequence[Sequence[int]], vocabulary: int) -> tuple[list[Floats], str]:
    """Return the toolkit's logits by prompt, [positions, vocabulary]; or why there are none."""
    if ending := result.run.ending:
        # It may name a file, but reports must not reveal this machine's paths.
        return [], shorten(without_paths(ending, [result.run.scratch]), _MOST_PROBLEM, placeholder=" ...")
    counts = [min(LAST_ROWS, len(prompt)) for prompt in prompts]
    size = 4 * sum(counts)
    if not result.logits or len(result.logits) % size or len(result.logits) < size * vocabulary:
        return [], f"get_logits gave {len(result.logits):,} bytes instead of {size * vocabulary:,}"
    # A vocabulary may be padded.
    rows = np.frombuffer(result.logits, np.float32).reshape(sum(counts), -1)[:, :vocabulary]
    if not np.isfinite(rows).all():
        return [], "get_logits gave NaN or infinite values"
    return np.split(rows, np.cumsum(counts)[:-1]), ""


def _log_shares(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _top(logits: Floats) -> tuple[int, ...]:
    """Return the likeliest ids at the last position, the likeliest first."""
    return tuple(int(index) for index in np.argsort(-logits[-1], kind="stable")[:_TOP])
