"""A chat with a daemon's model, on this machine or on a board.

A broken connection is re-established, and the answer continues where it was, even after a restart of the daemon if the
daemon has kept it. An answer is complete only when its `done` has arrived.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

from rkruntime.chat.link import BrokenError, Link, error_of, is_number, mapping, nonsense, result_of
from rkruntime.chat.repl import Note, Turn
from rkruntime.chat.ways import Way
from rkruntime.engine.generation import FinishReason
from rkruntime.errors import InputError, NoSuchSessionError, ServiceError, UsageError
from rkruntime.printable import one_line
from rkruntime.text.conversation import SCHEMA, check_conversation, read_conversation, write_conversation
from rkruntime.words import NAME, NAME_RULE, counted

# Seconds that a connection attempt may still take after a stop, in order to ask what the board has kept.
_PATIENCE_S: Final = 3.0
_RETRY_S: Final = (0.2, 1, 2, 4, 8, 15, 30, 60)
# Most characters to show of the reason why a model could not be loaded.
_LONGEST_STATE: Final = 500
# Times in a row that an operation may be interrupted; for an answer, without new text in between.
_MOST_BREAKS: Final = 8
_SAMPLING_RULE: Final = (
    "Before RKLLM 1.3.0, sampling is set when a model is loaded: set it in the daemon's settings on the board."
)


class RemoteChat:
    """See `rkruntime.chat.repl.ChatBackend`.

    Args:
        way: How to reach the daemon.
        session: Name of the conversation; without one, a temporary conversation that is deleted at the end.
        options: Fields of each question, such as max_tokens.

    Raises:
        UsageError: The name is not valid for a conversation.
        ServiceError: No daemon answers.
    """

    def __init__(self, way: Way, *, session: str | None, system: str, options: Mapping[str, Any]) -> None:
        if session is not None and not NAME.fullmatch(session):
            raise UsageError(
                f"{session[:80]!r} cannot be the name of a conversation.", hint=f"Use {NAME_RULE}, such as monday-2."
            )
        self._way = way
        self._session = session or f"chat-{uuid.uuid4().hex[:12]}"
        self._temporary = session is None
        self._options = dict(options)
        # Set to stop the current answer; None if there is no current answer.
        self._stopping: threading.Event | None = None
        self._sending = threading.Lock()
        self._link: Link | None = None
        # A link over which no daemon has answered yet; None if there is none.
        self._connecting: Link | None = None
        self._answered = self._generated = 0
        # Name of the conversation's last answer on the board, empty before the first one; None if it is not known.
        self._number: str | None = None
        self._ignored: list[str] = []
        self.last: Turn | None = None
        try:
            self._open(system)
        except BaseException:
            if self._link is not None:
                self._link.close()
            raise

    def _open(self, system: str) -> None:
        """Connect, and read what the board has of the conversation."""
        status = self._first_contact()
        self.emulated = bool(status.get("emulated"))
        self.title = one_line(f"{status.get('model')} on {self._way.place}: {_kind(status)}")
        data = self._read()
        self._system, self._number = str(data.get("system", "")), _number_of(data)
        if data["messages"]:
            turns = counted(len(data["messages"]) // 2, "turn")
            self.title += f"\n{self._session} continues after {turns}; /clear begins anew"
        if system:
            self.set_system(system)

    def _first_contact(self) -> dict[str, Any]:
        self._link = Link(self._way.command)
        try:
            return self._call("hello")
        except BrokenError as error:
            ended = self._way.ended(self._link.close())
            raise error.told or ended from None

    def _call(self, operation: str, body: Any = None) -> dict[str, Any]:
        """Execute one operation; returns its result.

        Raises:
            ServiceError: The daemon refuses.
            BrokenError: The connection is gone.
        """
        assert self._link is not None
        self._link.send({"op": operation, "session": self._session, "body": body})
        for event in self._link.events():
            end = event
        return result_of(end)

    def _steady(self, operation: str, body: Any = None) -> dict[str, Any]:
        """Like `_call`, but survive a broken connection; for operations that may be executed twice."""
        told = None
        for _ in range(_MOST_BREAKS):
            try:
                return self._call(operation, body)
            except BrokenError as error:  # noqa: PERF203 - the loop is there to try again
                told = error.told
                self._reconnect(threading.Event())
        raise told or ServiceError("The connection keeps breaking.", hint=self._look)

    def _reconnect(self, stopping: threading.Event) -> None:
        """Reconnect, unless `stopping` is set. Raises ServiceError if that fails for two minutes."""
        told = None
        for wait in _RETRY_S:
            if self._link is not None:
                self._link.close()
            if stopping.wait(wait):
                return
            try:
                self._connect(stopping)
            except BrokenError as error:
                told = error.told
            else:
                return
        if stopping.is_set():
            return
        raise told or ServiceError(
            f"The connection to {self._way.place} is lost.", hint="The conversation is kept on the board; try again."
        )

    def _connect(self, stopping: threading.Event) -> None:
        with self._sending:
            if stopping.is_set():
                return
            self._link = self._connecting = Link(self._way.command)
        try:
            self._call("hello")
        finally:
            with self._sending:
                self._connecting = None

    def _read(self) -> dict[str, Any]:
        """Return the conversation as stored on the board, with the board's own notes."""
        try:
            data = self._steady("read")
        except NoSuchSessionError:
            return {"schema": SCHEMA, "system": "", "messages": []}
        try:
            check_conversation(data)
        except InputError:
            raise nonsense("something that is not a conversation") from None
        return data

    @property
    def system(self) -> str:
        """See `ChatBackend`."""
        return self._system

    def set_system(self, text: str) -> None:
        """See `ChatBackend`."""
        self._change({"system": text})
        self._system = text

    def ask(self, text: str) -> Generator[str | Note, None, None]:
        """See `ChatBackend`.

        Raises:
            ServiceError: The daemon refuses, or can no longer be reached.
            UsageError: The question is too long for any daemon.
        """
        number, stopping = uuid.uuid4().hex, threading.Event()
        self._stopping = stopping
        self.last = Turn(0, FinishReason.ABORT, 0.0, 0.0)
        try:
            seen = yield from self._answer(text, number, stopping)
            if stopping.is_set():
                yield from self._rest(number, seen)
        finally:
            with self._sending:  # A stop that is still being sent would end the next question.
                self._stopping = None

    def _answer(self, text: str, number: str, stopping: threading.Event) -> Generator[str | Note, None, str]:
        """Do the part of `ask` up to the end of the answer or a stop; returns the text yielded."""
        body = {**self._options, "content": text, "id": number}
        if self._number is not None:
            body["after"] = self._number
        # If the question is asked again after an error, which was shown, it goes after whatever is there by then.
        self._number = None
        question = {"op": "ask", "session": self._session, "body": body}
        message, seen = question, ""
        breaks, before = 0, 0
        start, first = time.monotonic(), 0.0
        while True:
            try:
                with closing(self._exchange(message, stopping)) as events:
                    for event in events:
                        if event["type"] == "text":
                            first = first or time.monotonic() - start
                            seen += event["text"]
                            yield event["text"]
                        elif event["type"] == "begin":
                            yield from self._notes(event)
                        elif event["type"] == "done":
                            self._keep(event, first)
                            self._number = number
                return seen
            except BrokenError:  # noqa: PERF203 - the loop is there to try again
                if stopping.is_set():
                    return seen
                breaks, before = (breaks + 1 if len(seen) == before else 1), len(seen)
                if breaks > _MOST_BREAKS:
                    raise ServiceError("The answer keeps being interrupted.", hint=self._look) from None
                yield Note("\nThe connection broke; reconnecting ...")
                self._reconnect(stopping)
                resume = {"id": number, "received": len(seen)}
                message = {"op": "resume", "session": self._session, "body": resume}
            except NoSuchSessionError:
                # The question itself was lost with the connection.
                if message is question:
                    raise
                if seen:
                    raise ServiceError(
                        "The answer was interrupted, and the board has not kept it.", hint=self._look
                    ) from None
                message = question

    def _notes(self, begin: Mapping[str, Any]) -> Iterator[Note]:
        """Yield the board's notes before an answer; a list of ignored options only when it changes."""
        yield from (Note(one_line(note)) for note in begin["notes"])
        if begin["ignored"] not in ([], self._ignored):
            names = one_line(", ".join(begin["ignored"]))
            yield Note(f"The board ignores {names}. {_SAMPLING_RULE}")
        self._ignored = begin["ignored"]

    def _rest(self, number: str, seen: str) -> Iterator[str | Note]:
        """Yield the part of a stopped answer that only the board has, as the conversation continues after it."""
        try:
            # A change waits until the partial answer is kept.
            self._call("change", {})
            data = self._call("read")
            messages = check_conversation(data)["messages"]
            self._number = _number_of(data)
        except NoSuchSessionError:  # nothing was kept of the conversation's first question
            data, messages = {}, []
        except (BrokenError, ServiceError, InputError):
            yield Note("\nThe board did not report what it has kept of this answer.")
            return
        ours = data.get("number") == number and ("broken" in data or "reason" in data)
        kept = messages[-1]["content"] if ours and messages else ""
        if not kept.startswith(seen):
            yield Note("\nThe board has not kept this answer.")
        elif rest := kept[len(seen) :]:
            yield rest

    def _exchange(self, message: Mapping[str, Any], stopping: threading.Event) -> Generator[dict[str, Any], None, None]:
        assert self._link is not None
        with self._sending:
            if stopping.is_set():
                return
            self._link.send(message)
        whole, events = False, self._link.events()
        try:
            for event in events:
                whole = whole or event["type"] == "done"
                if event["type"] == "error":
                    # The `end` that follows belongs to this answer.
                    for _ in events:
                        pass
                    raise error_of(0, event)
                if event["type"] == "end":
                    if event["status"] != 499:
                        result_of(event)
                    if not whole and not stopping.is_set():
                        raise BrokenError
                    return
                yield event
        except GeneratorExit:
            self.stop()
            with suppress(BrokenError, ServiceError):
                for _ in events:
                    pass
                self._call("change", {})  # see `_rest`
            raise

    def _keep(self, event: Mapping[str, Any], first: float) -> None:
        self._answered += 1
        self._generated += event["tokens"]
        self.last = Turn(event["tokens"], FinishReason(event["reason"]), first, event["tokens_per_s"])

    @property
    def _look(self) -> str:
        return f"Ask again. The daemon's log has the cause: {self._way.log}"

    def stop(self) -> None:
        """See `ChatBackend`. The second time, the connection is given up."""
        with self._sending:
            if self._stopping is None or self._link is None:
                return
            again = self._stopping.is_set()
            self._stopping.set()
            if again:
                self._link.kill()
            elif self._connecting is not None:
                # A stop sent now would end the greeting rather than the answer.
                timer = threading.Timer(_PATIENCE_S, self._give_up, [self._connecting])
                timer.daemon = True
                timer.start()
            else:
                with suppress(BrokenError):
                    self._link.send({"op": "stop"})

    def _give_up(self, link: Link) -> None:
        """Kill a link if the board has not given its first answer on it by now."""
        with self._sending:
            if self._connecting is link:
                link.kill()

    def _change(self, body: Mapping[str, Any]) -> None:
        self._steady("change", body)
        self._number = None  # the last answer may no longer be kept under its name

    def clear(self) -> None:
        """See `ChatBackend`."""
        self._change({"clear": True})

    def take_back(self) -> str | None:
        """See `ChatBackend`."""
        data = check_conversation(self._read())
        kept: list[Any]
        *kept, question, _ = data["messages"] or [None, None]
        if question is None:
            return None
        self._change({"conversation": {**data, "messages": kept}})
        return str(question["content"])

    def save(self, path: Path) -> None:
        """See `ChatBackend`."""
        write_conversation(path, check_conversation(self._read()))

    def load(self, path: Path) -> None:
        """See `ChatBackend`."""
        data = read_conversation(path)
        self._change({"conversation": data})
        self._system = str(data.get("system", ""))

    def stats(self) -> Mapping[str, str]:
        """See `ChatBackend`."""
        status = self._steady("hello")
        queue, temperatures = (mapping(status.get(name)) for name in ("queue", "temperatures"))
        degrees = [value for value in temperatures.values() if is_number(value)]
        hottest = f"{max(degrees):.0f} °C" if degrees else "N/A"
        return {
            "model": self.title,
            "session": self._session,
            "answers": f"{self._answered}, {counted(self._generated, 'token')} generated",
            "last answer": self.last.summary(self.emulated) if self.last else "(none)",
            "context": _context(status),
            "daemon": one_line(f"{status.get('state')}, {queue.get('waiting', 0)} waiting, hottest zone {hottest}"),
        }

    def sessions(self) -> Mapping[str, str]:
        """Return the user's conversations with the daemon by name, each with its size. Raises ServiceError."""
        found = self._steady("list").get("sessions")
        rows = [mapping(row) for row in found] if isinstance(found, list) else []
        return {str(row.get("name")): counted(row["size"], "byte") for row in rows if is_number(row.get("size"))}

    def close(self) -> None:
        """Disconnect; a conversation without a name is deleted."""
        if self._link is None:
            return
        if self._temporary:
            with suppress(BrokenError, ServiceError):
                self._call("delete")
        self._link.close()


_STATES: Final[Mapping[str, str]] = {
    "loading": "it is still being loaded, and the first answer waits for that",
    "unloaded": "it is loaded for the first question",
    "failed": "it could not be loaded",
}


def _number_of(data: Mapping[str, Any]) -> str | None:
    """Return the name of a conversation's last answer; empty if there is no answer, None if it has no name."""
    number = data.get("number")
    return number if isinstance(number, str) and number else None if data["messages"] else ""


def _kind(status: Mapping[str, Any]) -> str:
    """Say what runs a daemon's model, or why nothing does yet."""
    if status.get("release") is None:
        state, error = str(status.get("state")), status.get("error")
        return f"{_STATES.get(state, state)}{f': {error}' if error else ''}"[:_LONGEST_STATE]
    return f"{'emulated ' if status.get('emulated') else ''}runtime {status['release']}, context of {_context(status)}"


def _context(status: Mapping[str, Any]) -> str:
    most = status.get("max_context")
    return f"up to {most:,} tokens" if is_number(most) else "not known yet"
