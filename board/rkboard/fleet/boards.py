"""The work on each board of an inventory: that of `rkedge deploy`, `status` and `rollback`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rkboard.deploy.plan import Planned, bundle_name, in_use
from rkboard.deploy.session import Session, names_of, text_of
from rkboard.deploy.trial import try_out
from rkboard.deploy.work import deploy
from rkboard.fleet.inventory import Entry
from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.errors import RefusedError, ServiceError, UsageError

Say = Callable[[str], None]
Connect = Callable[[str, Say], Session]
_TENTHS: Final = 10
_LARGE: Final = 100_000_000


@dataclass
class Boards:
    """Work for a `Rollout`.

    Args:
        say: Called with lines about progress, which begin with the board's name.
        connect: Opens the connection to a board.
    """

    say: Say
    connect: Connect = Session
    _bundles: dict[Path, Bundle] = field(default_factory=dict)
    _opening: threading.Lock = field(default_factory=threading.Lock)
    _planned: dict[str, frozenset[str]] = field(default_factory=dict)

    def bundle(self, entry: Entry) -> Bundle:
        """Return a board's bundle. Raises BundleError, or UsageError if the inventory names none for it."""
        if entry.bundle is None:
            raise UsageError(
                f"The inventory names no bundle for {entry.name}.", hint="Add `bundle: FOLDER` to it, or to its group."
            )
        with self._opening:  # several boards may have the same bundle
            if entry.bundle not in self._bundles:
                self._bundles[entry.bundle] = open_bundle(entry.bundle)
                self._bundles[entry.bundle].verify()
            return self._bundles[entry.bundle]

    def plan(self, entry: Entry) -> Mapping[str, Any]:
        """Return what a deployment would change, without changing anything."""
        bundle, person = self.bundle(entry), _Person(entry, self.say)
        with self.connect(entry.destination, person.say) as session:
            done = deploy(session, bundle, entry.library, person)
        self._planned[entry.name] = frozenset(person.shown)
        return {
            "bundle": bundle_name(bundle),
            "changes": person.changes,
            "now": in_use(done.look, "bundles"),
        }

    def deploy(self, entry: Entry) -> Mapping[str, Any]:
        """Carry out what was planned, then try out the bundle on the board."""
        bundle = self.bundle(entry)
        person = _Person(entry, self.say, self._planned[entry.name])
        with self.connect(entry.destination, person.say) as session:
            done = deploy(session, bundle, entry.library, person)
            facts = {"bundle": bundle_name(bundle), "changed": [planned.title for planned in done.changed]}
            emulated = bool(names_of(done.look, "status").get("emulated"))
            if not entry.test:
                return {**facts, "emulated": emulated}
            person.say("running the self-test, then asking the daemon")
            trial = try_out(session, bundle)
        if not trial.fine:
            raise RefusedError(
                f"{entry.name} serves {facts['bundle']}, but its self-test says {trial.verdict or 'nothing'}:"
                f" {' '.join(trial.problems)[:500]}",
                hint=f"rkedge rollback {entry.destination}",
            )
        return {**facts, "emulated": emulated, "tokens_per_s": round(trial.tokens_per_s, 2)}

    def status(self, entry: Entry) -> Mapping[str, Any]:
        """Return what a board serves. Raises ServiceError if no daemon answers there."""
        with self.connect(entry.destination, lambda _: None) as session:
            look = session.call("look", places=[])
        said = names_of(look, "status")
        if not said:
            raise ServiceError(
                f"No daemon answers on {entry.name}; it would serve {in_use(look, 'bundles') or 'nothing'}.",
                hint=f"rkedge logs {entry.destination}",
            )
        return {
            "bundle": in_use(look, "bundles"),
            "before": text_of(names_of(look, "previous"), "bundles"),
            "model": text_of(said, "model"),
            "daemon": text_of(said, "state"),
            "emulated": bool(said.get("emulated")),
        }

    def before(self, entry: Entry) -> Mapping[str, Any]:
        """Return what a rollback would change on a board. Raises RefusedError if it has nothing to go back to."""
        with self.connect(entry.destination, lambda _: None) as session:
            look = session.call("look", places=[])
        goal = text_of(names_of(look, "previous"), "bundles")
        if not goal:
            raise RefusedError(
                f"{entry.name} has nothing to go back to.", hint="Name the other boards: --board NAME, or --group NAME."
            )
        self._planned[entry.name] = frozenset([goal])
        return {"now": in_use(look, "bundles"), "bundle": goal, "changes": [f"serve {goal}"]}

    def roll_back(self, entry: Entry) -> Mapping[str, Any]:
        """Return a board to what it served before. Raises RefusedError if that is not what was shown."""
        person = _Person(entry, self.say, self._planned[entry.name])
        with self.connect(entry.destination, person.say) as session:
            session.call("lock")
            session.call("settle")
            person.expect([text_of(names_of(session.call("look", places=[]), "previous"), "bundles")])
            session.call("switch", parts=None)
            return {"bundle": in_use(session.call("look", places=[]), "bundles"), "changed": ["service"]}


class _Person:
    """The person who deploys to many boards: agrees to what was shown before, and to nothing else."""

    def __init__(self, entry: Entry, say: Say, agreed: frozenset[str] | None = None) -> None:
        self._name, self._say, self._agreed = entry.name, say, agreed
        self._tenth = 0
        self.shown: list[str] = []
        self.changes: Sequence[str] = ()

    def say(self, text: str) -> None:
        """See Person."""
        self._say(f"{self._name}: {text}")

    def agrees(self, missing: list[Planned]) -> bool:
        """See Person. Raises RefusedError if a change was not shown before."""
        self.shown = [str(planned.step["key"]) for planned in missing]
        self.changes = [f"{planned.title}: {planned.change}" for planned in missing]
        self.expect(self.shown)
        return self._agreed is not None

    def expect(self, wanted: Sequence[str]) -> None:
        """Raise RefusedError if something was not shown before."""
        if self._agreed is not None and not self._agreed.issuperset(wanted):
            raise RefusedError(
                f"{self._name} has changed since it was looked at.", hint="Start the same command again."
            )

    def progress(self, done: int, total: int) -> None:
        """See Person. Only large files are reported, every tenth of the way."""
        tenth = done * _TENTHS // max(total, 1)
        if total >= _LARGE and tenth > self._tenth:
            self._tenth = tenth
            self.say(f"{tenth * 10} % of {total / 1e6:,.0f} MB")
