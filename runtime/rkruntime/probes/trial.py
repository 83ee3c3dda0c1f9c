"""A loaded model to ask questions of, and the observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rkruntime.abi import since, within
from rkruntime.engine.generation import Finished, Request, Token
from rkruntime.errors import RunError, UnsupportedCallError
from rkruntime.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PROMPT: Final = "Name three rivers."
_SHORT: Final = 16
# The answer to a question that needs the logits of each token, if the library does not return them.
NO_ROWS: Final = "Not answered: the library does not return a row of logits for each token; see the question `logits`."


@dataclass(frozen=True)
class Observation:
    """The answer to one question.

    Attributes:
        says: The answer in a sentence.
        facts: The figures behind it.
        result: One of the results that the probe's docstring names; empty if there are none, or none was decided.
    """

    says: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    result: str = ""


class Run(NamedTuple):
    """The tokens of a run, and its end."""

    ids: list[int]
    end: Finished

    @property
    def read(self) -> int | None:
        """Number of tokens that the library says it has prefilled."""
        return int(self.end.perf.prefill_tokens) if self.end.perf else None

    @property
    def facts(self) -> dict[str, Any]:
        """The facts about the run that a report keeps."""
        return {"last_ids": self.ids[-8:], "end": asdict(self.end)}


class Trial:
    """A model to ask questions of, which is opened again if it is lost."""

    def __init__(self, load: Callable[[], Model]) -> None:
        self._load = load
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The model, loaded if necessary. Raises RKEdgeError if it cannot be loaded."""
        if self._model is None or not self._model.engine.alive:
            self.close()
            self._model = self._load()
        return self._model

    def request(self, **changes: Any) -> Request:
        """Return a request with the standard question, sampled greedily as far as the release allows."""
        return replace(self.model.request(_PROMPT, max_new_tokens=_SHORT), **changes)

    def empty(self) -> None:
        """Empty the cache if the release can; earlier releases keep nothing in it."""
        with suppress(UnsupportedCallError):
            self.model.engine.clear_cache()

    def run(self, request: Request) -> Run:
        """Run a request from its first token to its last."""
        *tokens, end = self.model.engine.generate(request)
        assert isinstance(end, Finished)
        return Run([token.token_id for token in tokens if isinstance(token, Token)], end)

    def logits(self, request: Request) -> NDArray[np.float32] | None:
        """Return a row of logits for each token of the prompt; None if the library returns other rows."""
        try:
            return self.model.engine.logits(request)
        except RunError as error:
            if "rows" not in error.details:
                raise
            return None

    def next_token(self, tokens: list[int]) -> int | None:
        """Return the model's next token after these; None if the answer ends there without passing on a token."""
        ids = self.run(self.request(tokens=tokens, max_new_tokens=1, stop_tokens=frozenset())).ids
        return ids[0] if ids else None

    def close(self) -> None:
        """Unload the model."""
        if self._model is not None:
            self._model.close()
            self._model = None


def silence(trial: Trial) -> str:
    """Why there is no figure of what was read."""
    if within(trial.model.engine.info.release, since("RKLLMResult.perf"), ""):
        return "this run did not say how many tokens it has read"
    return "this release does not say how many tokens it has read"


def same(equal: bool) -> str:
    """Whether two answers are the same, in words."""
    return "the same answer" if equal else "ANOTHER answer"
