"""The model behind the daemon: loaded when needed, reloaded when its worker is gone, and changed without a restart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rkruntime.bundle.manifest import open_bundle
from rkruntime.engine.open import RuntimeOptions, SamplingOptions
from rkruntime.errors import RKEdgeError, ServiceError, UsageError
from rkruntime.model import Model, open_model
from rkruntime.serve.settings import Settings, changed
from rkruntime.serve.threads import in_thread
from rkruntime.stop import Stop, stopped_work
from rkruntime.words import counted

if TYPE_CHECKING:
    from rkruntime.checks.preflight import Finding

log = logging.getLogger("rkedge")

# Seconds before the next attempt, by failures in a row; the first is immediate.
_BACKOFF: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# A client waits at most this long for the next attempt; otherwise it is told when to come back.
_PATIENCE: Final = 5.0


def load_model(settings: Settings, stop: Stop) -> Model:
    """Open and load the bundle of the settings; blocks until done or stopped.

    Raises:
        RKEdgeError: Anything wrong with the bundle, the library or the model.
    """
    if settings.bundle is None:
        raise UsageError(
            "No bundle was named.", hint="Give the folder: rkedge serve BUNDLE, or bundle: in the settings."
        )
    return open_model(
        settings.bundle,
        RuntimeOptions(settings.library, settings.abi, settings.max_context, settings.force),
        SamplingOptions(settings.temperature, settings.top_k, settings.top_p, settings.repeat_penalty),
        finding=_log_finding,
        load_timeout=settings.limits.load_s,
        token_timeout=settings.limits.token_s,
        stop=stop,
    )


def _log_finding(finding: Finding) -> None:
    level = logging.WARNING if finding.level == "warning" else logging.INFO
    log.log(level, "preflight: %s %s", finding.message, finding.hint)


def _name(settings: Settings) -> str:
    """The name in the bundle's manifest, or its folder's if that cannot be read now."""
    if settings.bundle is None:
        return "none"
    try:
        return open_bundle(settings.bundle).manifest.name
    except RKEdgeError:
        return settings.bundle.resolve().name


class Host:
    """Holds at most one model. Use it only with the queue's turn, except for `model`.

    Args:
        load: `load_model` or a replacement; called in a thread.

    Attributes:
        settings: Settings for the next load.
        loaded_with: Settings of the last load.
        name: Name of the bundle, loaded or not.
    """

    def __init__(self, settings: Settings, load: Callable[[Settings, Stop], Model] = load_model) -> None:
        self.settings = settings
        self.name = _name(settings)
        self._load = load
        self._model: Model | None = None
        self._loading: asyncio.Task[Model] | None = None
        self._stop = Stop()
        self._failures = 0
        self._next_try = 0.0
        self._loaded_from: Path | None = None
        self.loaded_with: Settings | None = None
        self.error: RKEdgeError | None = None
        self.restarts = 0

    @property
    def state(self) -> str:
        """`ready`, `loading`, `failed` (the last load or run ended with `error`) or `unloaded`."""
        if self._model is not None:
            return "ready"
        if self._loading is not None:
            return "loading"
        return "failed" if self.error else "unloaded"

    @property
    def current(self) -> Model | None:
        """The model, if loaded."""
        return self._model

    async def model(self) -> Model:
        """The model; loads it if necessary.

        Raises:
            ServiceError: It failed recently and the next attempt is some time away, or the daemon is stopping.
            RKEdgeError: The load failed.
        """
        if self._model is not None:
            return self._model
        if self._loading is None:
            await self._pause()
        self._stop.check()
        if self._loading is None:
            self._loading = asyncio.create_task(self._load_now())
        # A client that disconnects does not stop a load that others wait for.
        return await asyncio.shield(self._loading)

    async def _pause(self) -> None:
        wait = self._next_try - time.monotonic()
        if wait > _PATIENCE:
            reason = f" Last error: {self.error.message}" if self.error else ""
            raise ServiceError(
                f"The model failed {counted(self._failures, 'time')}; the next attempt is in"
                f" {counted(round(wait), 'second')}.{reason}",
                hint=self.error.hint if self.error else None,
                details={"retry_after_s": max(1, round(wait))},
            )
        if wait > 0:
            await asyncio.sleep(wait)

    async def _load_now(self) -> Model:
        start, settings = time.monotonic(), self.settings
        try:
            model = await in_thread(self._load, settings, self._stop)
        except RKEdgeError as error:
            if self._stop.asked:
                raise stopped_work() from error
            self._failed(error)
            raise
        finally:
            self._loading = None
        self._model, self._loaded_from, self.error = model, model.bundle.path.resolve(), None
        self.loaded_with, self.name = settings, model.bundle.manifest.name
        log.info("loaded %s in %.1f s", model.bundle.manifest.name, time.monotonic() - start)
        return model

    def _failed(self, error: RKEdgeError) -> None:
        self._failures += 1
        self._next_try = time.monotonic() + _BACKOFF[min(self._failures, len(_BACKOFF)) - 1]
        self.error = error
        log.error("%s: %s", type(error).__name__, error.message)

    def succeeded(self) -> None:
        """An answer was complete: reset the count of failures."""
        self._failures = 0

    async def lost(self, error: RKEdgeError) -> None:
        """The worker is gone: drop it, so that the next request starts a new one."""
        self._failed(error)
        self.restarts += 1
        await self.unload()

    def stop(self) -> None:
        """Stop the current load, and start no others."""
        self._stop.ask()

    async def close(self) -> None:
        """Stop loading, and free the model."""
        self.stop()
        if self._loading is not None:
            await asyncio.gather(self._loading, return_exceptions=True)
        await self.unload()

    async def unload(self) -> None:
        """Free the NPU."""
        model, self._model = self._model, None
        if model is not None:
            await in_thread(model.close)
            log.info("unloaded %s", model.bundle.manifest.name)

    def needs_load(self, settings: Settings) -> bool:
        """Whether these settings mean another model: other options, a link to another folder, or another bundle in it.

        Reads files. Raises BundleError if the folder no longer has one.
        """
        if changed(self.settings, settings, "load") or (
            self._model is not None and self.loaded_with is not None and changed(self.loaded_with, settings, "load")
        ):
            return True
        if settings.bundle is None or self._loaded_from is None:
            return False
        moved = settings.bundle.resolve() != self._loaded_from
        model = self._model
        return moved or (model is not None and open_bundle(settings.bundle).manifest != model.bundle.manifest)

    async def change(self, settings: Settings) -> None:
        """Apply other settings, with another bundle if they name one; if it does not load, restore the old one.

        Raises:
            RKEdgeError: The new bundle did not load.
        """
        before, self.settings = self.settings, settings
        if self._loading is not None:  # with the old settings, for a client that is gone
            await asyncio.gather(self._loading, return_exceptions=True)
        was_loaded = self._model is not None
        await self.unload()
        self._failures, self._next_try, self.error = 0, 0.0, None
        self.name = await in_thread(_name, settings)
        if not was_loaded and not settings.load_at_start:
            return
        try:
            await self.model()
        except RKEdgeError:
            self.settings, self._next_try = before, 0.0
            self.name = await in_thread(_name, before)
            with suppress(RKEdgeError):
                await self.model()
            raise
