"""A model to talk to: a bundle, its engine, and the process that makes its prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.bundle.names import find_bundle
from rkruntime.engine.generation import Request, Sampling, check_limit
from rkruntime.engine.open import RuntimeOptions, SamplingOptions, default_sampling, load_engine
from rkruntime.files import AnyPath
from rkruntime.schema import check_value
from rkruntime.stop import Stop
from rkruntime.text.answer import Answer, astream_answer, stream_answer
from rkruntime.text.conversation import Conversation
from rkruntime.text.prompt_process import PromptProcess, open_beside
from rkruntime.text.template import Message

if TYPE_CHECKING:
    from rkruntime.checks.preflight import Finding
    from rkruntime.engine.engine import Engine

# A question, or a conversation that ends in one.
Question: TypeAlias = str | Sequence[Message]


class Model:
    """A loaded bundle. It answers one question at a time; close it, or use it in a `with` block.

    Attributes:
        bundle: The bundle that was loaded.
        engine: The loaded model; `engine.info` has the runtime, the context, and whether it is emulated.
        prompts: The process that makes prompts with the bundle's tokenizer and template.
        sampling: Sampling that the model was loaded with.
        stop_tokens: Ids of the tokens that end an answer.
        max_new_tokens: Default limit of an answer; -1 for as many as the context has room for.
        loaded_at: Time of loading, in seconds since 1970.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, prompts: PromptProcess, sampling: Sampling, max_new_tokens: int = -1
    ) -> None:
        self.bundle, self.engine, self.prompts, self.sampling = bundle, engine, prompts, sampling
        self.stop_tokens = frozenset(bundle.manifest.stop_token_ids)
        self.max_new_tokens = max_new_tokens
        self.loaded_at = time.time()

    def request(
        self,
        question: Question,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingOptions | Sampling | None = None,
    ) -> Request:
        """Return the request for a run that answers a question.

        Args:
            max_new_tokens: 1 or more; -1 for as many as the context has room for; default: the model's own.
            sampling: SamplingOptions override fields of the sampling that the model was loaded with; a Sampling
                replaces it. Requires release 1.3.0.

        Raises:
            RunError: The model is closed.
            WorkerError: Its worker is gone.
            ContextFullError: The question does not fit.
            UsageError, BundleError: The template does not accept it, or an argument is invalid.
        """
        check_value("sampling", SamplingOptions | Sampling | None, sampling)
        if isinstance(sampling, SamplingOptions):
            max_new_tokens = sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
            sampling = sampling.over(self.sampling)
        limit = self.limit(max_new_tokens)
        messages = [Message("user", question)] if isinstance(question, str) else question
        check_value("question", Sequence[Message], messages)
        tokens, _ = self.prompts.prompt(messages, self.engine.info.max_context)
        return Request(tokens, limit, self.stop_tokens, sampling)

    def limit(self, max_new_tokens: int | None) -> int:
        """Return an answer's limit in tokens. Raises UsageError for an invalid one, or what `Engine.check` raises."""
        self.engine.check()
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        check_limit(limit)
        return limit

    def ask(self, question: Question, *, stop: str | Sequence[str] = (), **wishes: Any) -> Answer:
        """Return the whole answer; see `stream`."""
        *_, answer = self.stream(question, stop=stop, **wishes)
        assert isinstance(answer, Answer)
        return answer

    def stream(
        self, question: Question, *, stop: str | Sequence[str] = (), **wishes: Any
    ) -> Generator[str | Answer, None, None]:
        """Yield pieces of text as they arrive, then the Answer. To stop early, close the iterator.

        Args:
            stop: Text, or texts, before which the answer ends.
            wishes: `max_new_tokens` and `sampling`, as for `request`.

        Raises:
            RunError, WorkerError: From the engine; after a WorkerError the model must be opened again.
        """
        ends = _texts(stop)
        return stream_answer(self.engine, self.request(question, **wishes), self.prompts.vocabulary, ends)

    async def astream(
        self, question: Question, *, stop: str | Sequence[str] = (), **wishes: Any
    ) -> AsyncGenerator[str | Answer, None]:
        """Like `stream`, for asyncio; the prompt is made in a thread."""
        ends = _texts(stop)
        request = await asyncio.to_thread(self.request, question, **wishes)
        async with aclosing(astream_answer(self.engine, request, self.prompts.vocabulary, ends)) as pieces:
            async for piece in pieces:
                yield piece

    def chat(self, system: str = "", *, drop_oldest: bool = False) -> Chat:
        """Begin a conversation that remembers its turns."""
        return Chat(self, system, drop_oldest=drop_oldest)

    def close(self) -> None:
        """Unload the model and end both processes; may be called twice."""
        try:
            self.engine.close()
        finally:
            self.prompts.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Chat:
    """A conversation with a model.

    Attributes:
        conversation: The turns so far, which can be saved to a file and loaded again.
        dropped: Number of turns left out of the last prompt for lack of room.
    """

    def __init__(self, model: Model, system: str = "", *, drop_oldest: bool = False) -> None:
        check_value("drop_oldest", bool, drop_oldest)
        self._model, self._drop_oldest = model, drop_oldest
        self.conversation = Conversation(model.prompts, system)
        self.dropped = 0

    def ask(self, text: str, *, max_new_tokens: int | None = None, stop: str | Sequence[str] = ()) -> Answer:
        """Return the whole answer to the next turn; see `stream`."""
        *_, answer = self.stream(text, max_new_tokens=max_new_tokens, stop=stop)
        assert isinstance(answer, Answer)
        return answer

    def stream(
        self, text: str, *, max_new_tokens: int | None = None, stop: str | Sequence[str] = ()
    ) -> Generator[str | Answer, None, None]:
        """Yield pieces of the answer to the next turn, then the Answer. A turn is kept once its answer has ended.

        Raises:
            ContextFullError: The conversation does not fit, or no longer fits without `drop_oldest`.
            UsageError, BundleError: The template does not accept it.
            RunError, WorkerError: From the engine; the conversation stays as it was.
        """
        model, ends = self._model, _texts(stop)
        limit, context = model.limit(max_new_tokens), model.engine.info.max_context
        tokens, self.dropped = self.conversation.prompt(text, context, drop=self._drop_oldest)
        request = Request(tokens, limit, model.stop_tokens)
        for piece in stream_answer(model.engine, request, model.prompts.vocabulary, ends):
            if isinstance(piece, Answer):
                self.conversation.add(text, piece, self.dropped)
            yield piece


def _texts(stop: str | Sequence[str]) -> Sequence[str]:
    """Return the stop texts as a sequence: a single string is one text, not a sequence of letters."""
    texts = (stop,) if isinstance(stop, str) else stop
    check_value("stop", Sequence[str], texts)
    return texts


def open_model(
    bundle: AnyPath | Bundle,
    options: RuntimeOptions | None = None,
    sampling: SamplingOptions | None = None,
    *,
    finding: Callable[[Finding], None] | None = None,
    progress: Callable[[str], None] | None = None,
    stop: Stop | None = None,
    load_timeout: float | None = None,
    token_timeout: float | None = None,
) -> Model:
    """Open a bundle, find the library, and load the model in a worker process.

    Args:
        bundle: A folder; a str may also be a bundle's name, see `rkedge list`.
        options: Library, release and context, if not the defaults.
        sampling: Options that override the bundle's sampling.
        finding: Called with each finding about this machine.
        progress: Called with lines of output while the emulator is built.
        stop: Lets another thread stop the load, which then raises an error.
        load_timeout, token_timeout: See LoadOptions, which has the defaults; in seconds.

    Raises:
        RKEdgeError: Anything wrong with the bundle, the library, the machine or the model.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(find_bundle(bundle) if isinstance(bundle, str) else bundle)
    check_value("options", RuntimeOptions | None, options)
    check_value("sampling", SamplingOptions | None, sampling)
    check_value("stop", Stop | None, stop)
    for name, function in (("finding", finding), ("progress", progress)):
        check_value(name, Callable[..., object] | None, function)
    options, sampling = options or RuntimeOptions(), sampling or SamplingOptions()
    given = {"load_timeout": load_timeout, "token_timeout": token_timeout}
    timeouts = {name: seconds for name, seconds in given.items() if seconds is not None}

    def load(ending: Stop) -> Engine:
        return load_engine(bundle, options, sampling, finding or _ignore, progress, ending, **timeouts)

    prompts, engine = open_beside(bundle, load, stop)
    return Model(bundle, engine, prompts, sampling.over(default_sampling(bundle)), sampling.max_new_tokens or -1)


def _ignore(finding: Finding) -> None:
    """Do nothing: findings are also in `engine.info.findings`."""
