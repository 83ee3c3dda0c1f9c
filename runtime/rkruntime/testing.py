"""Help to test programs that use rkruntime: an engine that gives scripted answers, without a library or a process.

    from rkruntime.testing import fake_model

    def test_my_bot():
        model = fake_model("Hello!", [WorkerCrashedError("gone")])
        assert my_bot(model) == "Hello!"

If a real model's answers matter, open a bundle made with `--target emulator` instead.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from rkruntime.bundle.manifest import Bundle, Manifest, Source
from rkruntime.checks.preflight import Finding
from rkruntime.engine.generation import GREEDY, Event, Finished, FinishReason, Request, Token
from rkruntime.engine.loading import ModelInfo
from rkruntime.errors import ContextFullError, RunError, WorkerError
from rkruntime.model import Model
from rkruntime.printable import well_formed
from rkruntime.stop import Stop
from rkruntime.text.template import Message
from rkruntime.text.vocabulary import Vocabulary

# A scripted answer: a text, or token ids mixed with exceptions to raise and functions to call.
Script = str | Sequence[Any]

_BOS: Final = 256
_START_OF_TURN: Final = 257
_END_OF_TURN: Final = 258
_ROLES: Final = {"system": "user", "assistant": "model"}


def _encode(text: str) -> list[int]:
    return list(well_formed(text).encode())


@dataclass
class FakeEngine:
    """A replacement for `Engine` that gives the answers in order and keeps every request.

    Attributes:
        answers: Remaining answers. An exception in one is raised in its place; a function is called, and the run then
            waits for `abort`.
        encode: Function from a text to its token ids; default: the bytes of its UTF-8.
        requests: Every run requested.
        aborted: Runs whose reader left early.
    """

    answers: list[Script]
    encode: Callable[[str], Sequence[int]] = _encode
    max_context: int = 512
    emulated: bool = True
    requests: list[Request] = field(default_factory=list)
    aborted: int = 0
    closed: bool = False
    _abort: threading.Event = field(default_factory=threading.Event)

    @property
    def info(self) -> ModelInfo:
        """The facts of an emulated librkllmrt.so 1.2.3."""
        return ModelInfo(
            release="1.2.3",
            layout="L6",
            runtime_version="1.2.3",
            driver_version="",
            toolkit_version="1.2.3",
            platform="RK3588",
            dtype="W8A8",
            max_context=self.max_context,
            max_context_limit=self.max_context,
            npu_cores=3,
            emulated=self.emulated,
            load_seconds=0.0,
            findings=(),
            log=(),
        )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of `info`; there are none."""
        return self.info.findings

    @property
    def alive(self) -> bool:
        """True until it is closed."""
        return not self.closed

    @property
    def lost(self) -> bool:
        """True once it is closed."""
        return self.closed

    def check(self) -> None:
        """Raise RunError if the engine is closed."""
        if self.closed:
            raise RunError("The model is closed.", hint="Load it again.")

    def generate(self, request: Request, stop: Stop | None = None) -> Generator[Event, None, None]:
        """Yield the next answer's tokens, then Finished."""
        self.check()
        self.requests.append(request)
        if not self.answers:
            raise AssertionError("the fake engine has no answers left")
        answer = self.answers.pop(0)
        self._abort.clear()
        try:
            with (stop or Stop()).ending(self.abort):
                yield from self._events(request, self.encode(answer) if isinstance(answer, str) else answer)
        except GeneratorExit:
            self.aborted += 1
            raise

    def _events(self, request: Request, steps: Sequence[Any]) -> Generator[Event, None, None]:
        reason, count = FinishReason.STOP, 0
        for step in steps:
            if isinstance(step, BaseException):
                self.closed = self.closed or isinstance(step, WorkerError)
                raise step
            if step in request.stop_tokens:
                break
            if callable(step):
                step()
                if not self._abort.wait(5):
                    raise TimeoutError("nobody called abort()")
            if self._abort.is_set():
                reason = FinishReason.ABORT
                break
            if count == request.max_new_tokens:
                reason = FinishReason.LENGTH
                break
            count += 1
            yield Token(step)
        yield Finished(reason, len(request.tokens), count)

    async def agenerate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Like `generate`, for asyncio."""
        for event in self.generate(request):
            yield event

    async def deliver(self, request: Request, take: Callable[[list[Event]], bool]) -> None:
        """Like `agenerate`, but pass each event to `take`, until it returns False."""
        async with aclosing(self.agenerate(request)) as events:
            async for event in events:
                if not take([event]):
                    break

    def abort(self) -> None:
        """End the current run."""
        self._abort.set()

    def kill(self) -> None:
        """Close the engine."""
        self.closed = True

    def close(self) -> None:
        """Close the engine."""
        self.closed = True


class _Prompts:
    """Makes prompts with Gemma's template; a token is a byte of UTF-8 or a control token."""

    lost = False

    def __init__(self) -> None:
        control = {"<bos>": _BOS, "<start_of_turn>": _START_OF_TURN, "<end_of_turn>": _END_OF_TURN}
        self.vocabulary = Vocabulary([bytes([value]) for value in range(256)] + [b""] * len(control), control)

    def prompt(self, messages: Sequence[Message], max_context: int, *, drop: bool = False) -> tuple[list[int], int]:
        tokens = [_BOS]
        for message in messages:
            role = _ROLES.get(message.role, message.role)
            tokens += [_START_OF_TURN, *_encode(f"{role}\n{message.content}"), _END_OF_TURN, *_encode("\n")]
        tokens += [_START_OF_TURN, *_encode("model\n")]
        if len(tokens) <= max_context:
            return tokens, 0
        if drop and len(messages) > 2:
            rest = [*messages[:1], *messages[3:]] if messages[0].role == "system" else messages[2:]
            fitting, dropped = self.prompt(rest, max_context, drop=True)
            return fitting, dropped + 1
        raise ContextFullError(f"The prompt is too long: {len(tokens)} tokens, and the context holds {max_context}.")

    def check(self, messages: Sequence[Message]) -> None:
        pass

    def hurry(self) -> None:
        pass

    def close(self) -> None:
        pass


def fake_manifest(**facts: Any) -> Manifest:
    """Return the manifest of an emulated Gemma 2 without files, with the given fields replaced."""
    fields: dict[str, Any] = {
        "name": "fake",
        "family": "gemma2",
        "size": "2B",
        "parameters": 2_614_341_888,
        "source": Source("fake"),
        "target": "emulator",
        "platform": "rk3588",
        "dtype": "w8a8",
        "npu_cores": 3,
        "max_context": 4096,
        "toolkit_version": "1.2.3",
        "model_file": "model.rkemu",
        "bos_token_id": _BOS,
        "stop_token_ids": (_END_OF_TURN,),
        "files": {},
    }
    return Manifest(**{**fields, **facts})


def fake_model(*answers: Script, max_context: int = 4096) -> Model:
    """Return a Model that needs no files, with a FakeEngine that gives these answers."""
    manifest = fake_manifest(max_context=max_context)
    engine = FakeEngine(list(answers), max_context=max_context)
    return Model(Bundle(Path("fake"), manifest), cast(Any, engine), cast(Any, _Prompts()), GREEDY)
