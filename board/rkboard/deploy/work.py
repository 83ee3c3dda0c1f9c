"""A deployment from end to end: look, plan, ask, change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from rkboard.deploy import plan
from rkboard.deploy.plan import Facts, Planned
from rkboard.deploy.session import Session, list_of
from rkboard.deploy.wheels import hashed, own_wheel, program_name, wheels_for
from rkruntime.bundle.manifest import Bundle
from rkruntime.engine.open import SEARCHED
from rkruntime.errors import RefusedError, ServiceError


class Person(Protocol):
    """The person who deploys."""

    def say(self, text: str) -> None:
        """Tell them what is going on."""

    def agrees(self, missing: list[Planned]) -> bool:
        """Show them what would be changed, and ask."""

    def progress(self, done: int, total: int) -> None:
        """Tell them how many bytes of how many have been sent."""


@dataclass(frozen=True)
class Done:
    """The outcome of a deployment.

    Attributes:
        changed: The steps that were carried out.
        look: The board's answer to `look` afterwards.
        agreed: Whether the person agreed to the changes.
    """

    changed: list[Planned]
    look: Mapping[str, Any]
    agreed: bool = True


def deploy(session: Session, bundle: Bundle, library: Path | None, person: Person, *, offline: bool = False) -> Done:
    """Put a bundle and what it needs onto a board, and let the daemon serve it. A second run changes nothing.

    Args:
        offline: The board is a file tree without a running system.

    Raises:
        BundleError, LibraryError: The bundle or the library is not what it should be.
        RefusedError: The bundle would not work there.
        HostError: The wheels cannot be downloaded.
        ServiceError: The connection breaks, or a step fails there.
    """
    look = session.call("look", places=SEARCHED)
    facts = Facts.of(look, offline=offline)
    bundle.verify()
    steps = _steps(look, facts, bundle, library)
    missing = _missing(session, facts, steps, person.say)
    if not missing:
        return Done([], look)
    if not person.agrees(missing):
        return Done([], look, agreed=False)
    session.call("lock", make=True)
    session.call("settle")
    for planned in _missing(session, facts, steps, person.say):  # somebody else may have changed the board meanwhile
        person.say(f"{planned.title}: {planned.change}")
        if planned.sources:
            session.send(planned.sources, person.progress)
        session.call("change", step=planned.step)
    return Done(missing, session.call("look", places=SEARCHED))


def _steps(look: Mapping[str, Any], facts: Facts, bundle: Bundle, library: Path | None) -> list[Planned]:
    before, after = plan.system_steps("")
    parts = {"bundles": plan.bundle_name(bundle)}
    middle = []
    if library is not None:
        found, parts["libraries"] = plan.library_of(library, facts.target.machine)
        middle.append(plan.library_step(library, found, parts["libraries"]))
    elif bundle.manifest.target == "toolkit":
        _expect_library(look)
    _expect_machine(bundle, facts)
    parts["programs"] = name = program_name(facts.target, own_wheel()[1])
    middle.append(plan.program_step(facts, name, version("rkedge"), {}, {}))
    return [*before, *middle, plan.bundle_step(bundle), *after, plan.serve_step(parts)]


def _expect_library(look: Mapping[str, Any]) -> None:
    if not plan.in_use(look, "libraries") and not list_of(look, "libraries"):
        raise RefusedError(
            f"The board has no {plan.LIBRARY}, which comes from the vendor.",
            hint=f"Name the one that you have: --library {plan.LIBRARY} (rkllm-runtime/Linux/librkllm_api/aarch64 in"
            " https://github.com/airockchip/rknn-llm).",
        )


def _expect_machine(bundle: Bundle, facts: Facts) -> None:
    made = bundle.manifest
    if made.target == "toolkit" and facts.target.machine != "aarch64":
        raise RefusedError(
            f"The bundle is for the NPU of an {made.platform}, and this is an {facts.target.machine} machine.",
            hint="Convert it with --target emulator to try it on a PC.",
        )


def _missing(session: Session, facts: Facts, steps: list[Planned], say: Callable[[str], None]) -> list[Planned]:
    """Return the steps that are not done yet. Wheels are downloaded only if the program is one of them."""
    done = list_of(session.call("check", steps=[dict(planned.step) for planned in steps]), "done")
    if len(done) != len(steps):
        raise ServiceError(f"{session.destination} sent something that is not an answer.", hint="")
    missing = [planned for planned, is_so in zip(steps, done, strict=True) if is_so is not True]
    return [_with_wheels(facts, planned, say) if planned.title == "program" else planned for planned in missing]


def _with_wheels(facts: Facts, planned: Planned, say: Callable[[str], None]) -> Planned:
    wheels = wheels_for(facts.target, say)
    return plan.program_step(facts, planned.step["name"], version("rkedge"), wheels, hashed(wheels))
