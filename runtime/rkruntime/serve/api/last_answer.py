"""What a session's file says of its last answer: its name, why it ended, or what there is of a partial one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final, Literal

from rkruntime.checks.machine import boot_id
from rkruntime.engine.generation import PER_REQUEST, TokenId
from rkruntime.errors import BodyError, InputError, NoSuchSessionError
from rkruntime.schema import Between, build
from rkruntime.serve.api.http import BodyReader

_Moment = Annotated[float, Between(0, 1e15)]
_OPTIONS: Final = ("max_tokens", *PER_REQUEST, "stop")


def answer_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a question says of its answer."""
    return {name: body[name] for name in _OPTIONS if name in body}


@dataclass(frozen=True)
class Partial:
    """An answer that was broken off, as the session's file has it: the question, what was kept, and since when.

    Attributes:
        tokens: Ids of `text`, by the model with the fingerprint `model`.
        drop, options: As asked.
        boot, since_boot, at: See `moment`.
    """

    question: str
    text: str
    tokens: tuple[TokenId, ...]
    model: str
    options: dict[str, Any]
    since_boot: _Moment
    at: _Moment
    boot: str = ""
    drop: bool = False


@dataclass(frozen=True)
class Notes:
    """What the daemon adds to a conversation: the last answer's name, and why it ended, or what there is of it."""

    number: str = ""
    reason: Literal["stop", "length", "abort", "pause"] = "stop"
    broken: Partial | None = None


def checked(data: Mapping[str, Any], bodies: BodyReader) -> dict[str, Any]:
    """A session's file with its notes checked. Raises InputError for what no daemon has written."""
    given = {key: value for key, value in data.items() if value is not None}
    notes = {item.name: given[item.name] for item in fields(Notes) if item.name in given}
    broken = build(Notes, notes, lambda what: InputError(f"{what}.")).broken
    if broken is None:
        return given
    if not broken.tokens:
        raise InputError("broken.tokens is empty.")
    try:
        read = bodies.check("SessionMessage", {**broken.options, "content": broken.question})
    except BodyError as error:
        raise InputError(f"broken.options: {error.message}") from error
    return {**given, "broken": {**given["broken"], "options": answer_options(read)}}


@dataclass(frozen=True)
class Received:
    """What a client has of an answer that it wants the rest of.

    Attributes:
        characters: Number of them.
        sha256: Hash of their UTF-8, in hex; empty if the client does not say.
    """

    characters: int = 0
    sha256: str = ""

    def check(self, text: str) -> None:
        """Raise NoSuchSessionError unless `text` begins with it: the rest of another generation is not the rest."""
        start = text[: self.characters]
        same = self.sha256 in ("", hashlib.sha256(start.encode("utf-8", "replace")).hexdigest())
        if len(start) < self.characters or not same:
            raise NoSuchSessionError("What has arrived of that answer was not kept.", hint="Ask again.")


def moment() -> dict[str, Any]:
    """The time, for `age`: by the clock since boot, and by wall clock."""
    return {"boot": boot_id(), "since_boot": time.clock_gettime(time.CLOCK_BOOTTIME), "at": time.time()}


def age(then: Mapping[str, Any]) -> float:
    """Seconds since this result of `moment`. A board without a clock battery may learn the date hours after boot.

    So the wall clock counts only if the machine was rebooted.
    """
    now = moment()
    clock = "since_boot" if now["boot"] and then.get("boot") == now["boot"] else "at"
    age: float = now[clock] - then[clock]
    return age


def with_broken(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A session in which a partial answer that was never resumed becomes a turn as it is."""
    broken = data.get("broken")
    if not broken:
        return data
    answer = {"role": "assistant", "content": broken["text"], "tokens": broken["tokens"]}
    return {**data, "messages": [*data["messages"], {"role": "user", "content": broken["question"]}, answer]}


def without_answer_to(data: Mapping[str, Any], question: str, number: str) -> Mapping[str, Any]:
    """The session without the answer to this very question, if it is put again: the client could not keep that one."""
    if not number or data.get("number") != number:
        return data
    if "broken" in data:
        again = data["broken"]["question"] == question
        return {key: value for key, value in data.items() if key != "broken"} if again else data
    *before, asked, _ = data["messages"] if len(data["messages"]) > 1 else [{}, {}]
    return {**data, "messages": before} if asked.get("content") == question else data


def check_after(data: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    """Check that a session is the one that the client knows, if it says what that is (`after`).

    Raises:
        BodyError: Another client has changed it, or has begun one of that name (409).
        NoSuchSessionError: It is gone.
    """
    if "after" not in body:
        return
    used = data["messages"] or "broken" in data
    if not used and body["after"]:
        raise NoSuchSessionError(
            "The daemon does not have this conversation: it was deleted or cleared elsewhere, or could not be kept.",
            hint="Ask again to begin a new one.",
        )
    number = data.get("number")
    known = bool(number) and number in (body["after"], body.get("id"))
    # One that is about to begin may have been given the same system prompt before.
    taken = not body["after"] and data["system"] not in ("", body.get("system", data["system"]))
    if taken or (used and not known):
        raise changed_elsewhere()


def changed_elsewhere() -> BodyError:
    """The error for a client that does not know the last answer of a session."""
    return BodyError(
        "The daemon's copy of this conversation differs: it went on elsewhere, or its last answer could not be kept.",
        hint="Look at what there is now, and ask again.",
        details={"status": 409, "code": "session_changed"},
    )
