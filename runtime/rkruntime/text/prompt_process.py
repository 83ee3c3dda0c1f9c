"""A bundle's tokenizer and template in their own process, because both are untrusted.

Whatever they do, the daemon's event loop and the terminal stay responsive and memory stays free; see `CallLimits`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from rkruntime.bundle.manifest import MANIFEST, Bundle, Manifest
from rkruntime.errors import BundleError, HostError, RKEdgeError, RunError
from rkruntime.stop import Stop
from rkruntime.text.confined import CallLimits, Confined
from rkruntime.text.template import Message
from rkruntime.text.vocabulary import Vocabulary

# The child's module. It imports little, as a chat waits for its start.
CHILD: Final = "rkruntime.text.prompt_child"
_LIMITS: Final = CallLimits()
# A tokenizer of 256,000 tokens takes 2 s of CPU time on a PC, and a board's small cores are ten times slower.
_LOAD: Final = CallLimits(cpu_s=120, wall_s=300)


class PromptProcess:
    """See `rkruntime.text.prompts.Prompts`. The bundle's files are verified before they are parsed.

    Raises:
        BundleError: Tokenizer or template cannot be used, as trial prompts show.
        HostError: The process cannot be started.

    Args:
        stop: Lets another thread stop the start.

    Attributes:
        lost: Whether the process exited and could not be restarted, perhaps because the bundle has changed.
    """

    def __init__(self, bundle: Bundle, limits: CallLimits = _LIMITS, stop: Stop | None = None) -> None:
        self._bundle = bundle
        self._child, self._limits = Confined(CHILD, "The bundle's tokenizer or chat template"), limits
        self._lock = threading.RLock()  # reentrant, to refuse a signal's handler that calls during a call
        self.lost = self._closed = self._busy = False
        self._ready: int | None = None
        with (stop or Stop()).ending(self._child.hurry):
            self.vocabulary = self._open()

    def _open(self) -> Vocabulary:
        bundle, manifest = self._bundle, self._bundle.manifest
        source, tokenizer = bundle.read_template(), bundle.read_tokenizer()
        try:
            vocabulary = open_in(
                self._child, tokenizer, bundle.tokenizer, source, manifest.system_role, manifest.special_tokens
            )
            vocabulary.extend(manifest.vocab_size)
            _check_ids(manifest, vocabulary)
            self._ready = self._child.idle_pid
            return vocabulary
        except BaseException:
            self._child.close()
            raise

    def _call(self, name: str, **values: Any) -> dict[str, Any]:
        # No other thread may come between a child's start and its first prompt.
        with self._lock:
            if self._closed:
                raise RunError("The model is closed.", hint="Open it again.")
            if self._busy:
                raise RunError("A prompt is being made, and this is a signal's handler.", hint="Ask after it.")
            try:
                self._busy = True
                return self._answer(name, values)
            except RKEdgeError:
                if self._closed:  # by another thread, which killed the child
                    raise RunError("The model was closed before the prompt was made.", hint="Open it again.") from None
                raise
            finally:
                self._busy = False

    def _answer(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        self._child.take_time()
        if self._ready is None or self._child.idle_pid != self._ready:
            self.lost = True
            self._open()
            self.lost = False
        return self._child.call(name, self._limits, **values)[0]

    def prompt(self, messages: Sequence[Message], max_context: int, *, drop: bool = False) -> tuple[list[int], int]:
        """See `Prompts`."""
        answer = self._call("prompt", messages=_plain(messages), max_context=max_context, drop=drop)
        return self._tokens(answer), int(answer["dropped"])

    def check(self, messages: Sequence[Message]) -> None:
        """See `Prompts`."""
        self._call("check", messages=_plain(messages))

    def encode(self, text: str, max_context: int, *, cut: bool = False) -> list[int]:
        """See `Prompts`."""
        return self._tokens(self._call("encode", text=text, max_context=max_context, cut=cut))

    def _tokens(self, answer: dict[str, Any]) -> list[int]:
        tokens: list[int] = answer["tokens"]
        if not all(type(token) is int and 0 <= token < self.vocabulary.vocab_size for token in tokens):
            raise BundleError("The chat template or tokenizer returned ids that the model does not have.")
        return tokens

    def hurry(self) -> None:
        """Cut short the current prompt; call it from another thread."""
        self._child.hurry()

    def close(self) -> None:
        """End the process; later calls raise RunError."""
        self._closed = True
        self._child.close()


class Closes(Protocol):
    """Something that `open_beside` loads and closes again on failure."""

    def close(self) -> None:
        """Release its memory."""


Loaded = TypeVar("Loaded", bound=Closes)


def open_beside(
    bundle: Bundle, load: Callable[[Stop], Loaded], stop: Stop | None = None
) -> tuple[PromptProcess, Loaded]:
    """Start the process for a bundle's prompts while its model loads, as each takes seconds on a board.

    Args:
        load: Loads the model unless it is stopped.
        stop: Lets another thread stop both.

    Raises:
        HostError: No thread can be started.
        RKEdgeError: What PromptProcess or `load` raises. When one of them fails, the other is stopped.
    """
    starting, loading, both = Stop(), Stop(), stop or Stop()
    with ThreadPoolExecutor(1) as pool, both.ending(starting.ask), both.ending(loading.ask):
        try:
            prompts = pool.submit(PromptProcess, bundle, stop=starting)
        except RuntimeError as error:  # as Python says both
            raise HostError(
                f"The model cannot be opened: {error}.",
                hint="Check the limit on processes and threads (ulimit -u, TasksMax), and that Python is not exiting.",
            ) from error
        prompts.add_done_callback(lambda done: loading.ask() if done.exception() else None)
        try:
            loaded = load(loading)
        except BaseException as error:
            failed = prompts.exception() if prompts.done() and not starting.asked else None
            _give_up(prompts, starting)
            if failed is not None and isinstance(error, RKEdgeError):
                raise failed from None
            raise
        try:
            return prompts.result(), loaded
        except BaseException:  # Ctrl-C too
            loaded.close()
            _give_up(prompts, starting)
            raise


def _give_up(prompts: Future[PromptProcess], starting: Stop) -> None:
    starting.ask()
    with suppress(RKEdgeError):
        prompts.result().close()


def _check_ids(manifest: Manifest, vocabulary: Vocabulary) -> None:
    """Raise BundleError if the manifest names a token id that the vocabulary does not have."""
    for name, ids in (("bos_token_id", (manifest.bos_token_id,)), ("stop_token_ids", manifest.stop_token_ids)):
        if ids and max(ids) >= vocabulary.vocab_size:
            raise BundleError(
                f"{MANIFEST}: {name} has {max(ids):,}; the tokenizer has {vocabulary.vocab_size:,} tokens."
            )


def _plain(messages: Sequence[Message]) -> list[list[Any]]:
    return [[message.role, message.content, message.tokens] for message in messages]


def open_in(
    child: Confined,
    tokenizer: bytes,
    where: object,
    template: str | None,
    system_role: str,
    special_tokens: Mapping[str, str],
) -> Vocabulary:
    """Have a child load and try out tokenizer and template.

    Args:
        child: Child whose module is CHILD.
        tokenizer: Contents of tokenizer.json; `where` is its path, for messages.
        template, system_role, special_tokens: See `load_template`.

    Raises:
        BundleError: Tokenizer or template cannot be used.
        HostError: The child cannot be started.
    """
    answer, packed = child.call("load", _LOAD, tokenizer, path=str(where))
    facts = {"template": template, "system_role": system_role, "special_tokens": dict(special_tokens)}
    child.call("open", _LIMITS, b"", **facts)
    return Vocabulary.unpack(packed, {str(name): int(index) for name, index in answer["control"].items()})


def render(
    child: Confined,
    source: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    special_tokens: Mapping[str, str],
    limits: CallLimits,
    *,
    add_generation_prompt: bool = True,
) -> list[dict[str, str]]:
    """Render conversations as text, like transformers' apply_chat_template: a `text` or an `error` for each.

    Args:
        child: Child whose module is CHILD.

    Raises:
        BundleError: A limit was reached.
        HostError: The child cannot be started.
    """
    answer, _ = child.call(
        "render",
        limits,
        template=source,
        conversations=conversations,
        special_tokens=dict(special_tokens),
        add_generation_prompt=add_generation_prompt,
    )
    outcomes: list[dict[str, str]] = answer["outcomes"]
    return outcomes
