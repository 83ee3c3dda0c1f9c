"""The model behind the daemon: loaded when needed, reloaded when its worker is gone, and changed without a restart."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rkruntime.abi import within
from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.defects import is_defect, typed
from rkruntime.engine.generation import PER_REQUEST, Sampling
from rkruntime.engine.open import RuntimeOptions, SamplingOptions, default_sampling, find_library
from rkruntime.engine.worker.encode import PER_RUN_SAMPLING
from rkruntime.errors import RKEdgeError, ServiceError, UsageError
from rkruntime.model import Model, open_model
from rkruntime.schema import types_of
from rkruntime.serve.settings import Settings, changed
from rkruntime.stop import Stop
from rkruntime.threads import in_thread
from rkruntime.words import counted

if TYPE_CHECKING:
    from rkruntime.checks.preflight import Finding

log = logging.getLogger("rkedge")

# Seconds before the next attempt, by the number of failures in a row; the first attempt is immediate.
_BACKOFF: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# Most seconds that a client waits for the next attempt; otherwise it is told when to come back.
_PATIENCE: Final = 5.0
# Seconds after a load that failed until the daemon tries again by itself.
_RETRY_S: Final = 60.0


def load_model(settings: Settings, stop: Stop) -> Model:
    """Open and load the bundle of the settings; blocks until done or stopped.

    Raises:
        RKEdgeError: Anything wrong with the bundle, the library or the model.
    """
    model = open_model(
        _bundle(settings),
        _options(settings),
        SamplingOptions(**{name: value for name, value in vars(settings).items() if name in types_of(Sampling)}),
        finding=_log_finding,
        load_timeout=settings.limits.load_s,
        token_timeout=settings.limits.token_s,
        stop=stop,
    )
    release = model.engine.info.release
    if not within(release, PER_RUN_SAMPLING, ""):
        sampling = ", ".join(f"{name} {getattr(model.sampling, name):g}" for name in PER_REQUEST)
        log.info("RKLLM %s takes sampling only with the model (%s): requests cannot change it", release, sampling)
    return model


def check_model(settings: Settings, stop: Stop) -> None:
    """Check another bundle as far as possible without memory for its model; blocks until done or stopped.

    Raises:
        RKEdgeError: The bundle is damaged, or there is no library for it.
    """
    bundle = _bundle(settings)
    bundle.verify(progress=stop.check)
    default_sampling(bundle)
    find_library(bundle, _options(settings), stop=stop)


def _bundle(settings: Settings) -> Bundle:
    folder = _folder(settings)
    if folder is None:
        raise UsageError(
            "No bundle was named.", hint="Give the folder: rkedge serve BUNDLE, or bundle: in the settings."
        )
    return open_bundle(folder)


def _folder(settings: Settings) -> Path | None:
    """Return the bundle's real folder: the settings may name a link, which may change while a model is loaded."""
    return Path(os.path.realpath(settings.bundle)) if settings.bundle else None


def _options(settings: Settings) -> RuntimeOptions:
    return RuntimeOptions(
        settings.library, settings.release, settings.max_context, settings.force, settings.base_domain_id
    )


def _log_finding(finding: Finding) -> None:
    level = logging.WARNING if finding.level == "warning" else logging.INFO
    log.log(level, "preflight: %s %s", finding.message, finding.hint)


def _name(settings: Settings) -> str:
    """Return the name in the bundle's manifest, or the folder's name if the manifest cannot be read now."""
    if settings.bundle is None:
        return "none"
    try:
        return _bundle(settings).manifest.name
    except RKEdgeError:
        return Path(os.path.realpath(settings.bundle)).name


def _told(load: asyncio.Task[Model]) -> None:
    """Have asyncio not report a failed load whose client is gone: the host has written it to the log."""
    if not load.cancelled():
        load.exception()


def _of_load(error: Exception) -> RKEdgeError:
    """Return the error that a failed load is: settings that are wrong are nothing that a client has asked for."""
    found = typed(error)
    return ServiceError(found.message, hint=found.hint) if isinstance(found, UsageError) else found


class Host:
    """Holds at most one model. Call its methods only while holding the queue's turn, except for `model`.

    Args:
        load: `load_model` or a replacement; called in a thread.
        check: `check_model` or a replacement; called in a thread.

    Attributes:
        settings: Settings for the next load.
        loaded_with: Settings of the last load.
        name: Name of the bundle, loaded or not.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[Settings, Stop], Model] = load_model,
        check: Callable[[Settings, Stop], None] = check_model,
    ) -> None:
        self.settings = settings
        self.name = _name(settings)
        self._load = load
        self._check = check
        self._model: Model | None = None
        self._loading: asyncio.Task[Model] | None = None
        self._stop = Stop()
        self._failures = 0
        self._next_try = 0.0
        # When the model is `due` again.
        self._due_at = 0.0
        # Whether the settings or a request asked for the model, and nobody has unloaded it since.
        self._wanted = settings.load_at_start
        # The folder that `settings.bundle` named at the last load with it, if there was one.
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

    @property
    def due(self) -> bool:
        """Whether the model should be loaded now, without waiting for a request, which /ready may keep away.

        Its worker died, perhaps killed for its memory, or a load failed a minute ago.
        """
        if self._model is not None:
            return self._model.engine.lost
        return self._wanted and self._loading is None and time.monotonic() >= self._due_at

    async def model(self) -> Model:
        """Return the model, loading it if necessary.

        Raises:
            ServiceError: A load failed recently and the next attempt is some time away, or the daemon is stopping.
            RKEdgeError: The load failed.
        """
        self._wanted = True
        await self._look()
        if self._model is not None:
            return self._model
        if self._loading is None:
            await self._pause()
        self._stop.check()
        if self._loading is None:
            self._loading = asyncio.create_task(self._load_now())
            self._loading.add_done_callback(_told)
        # A client that disconnects does not stop a load that others wait for.
        return await asyncio.shield(self._loading)

    async def bring_back(self) -> None:
        """Load the model if it is `due`. Raises what `model` raises, but a failure makes no request wait.

        The pauses are for clients that ask again and again. Whoever has mended the cause should not meet one.
        """
        await self._look()
        if not self.due:
            return
        before = self._failures, self._next_try
        try:
            await self.model()
        except BaseException:
            self._failures, self._next_try = before
            raise

    async def again(self) -> None:
        """Forget the pauses after failures, and load the model if it is wanted. Raises what `model` raises."""
        self._failures, self._next_try, self._due_at = 0, 0.0, 0.0
        await self.bring_back()

    async def _look(self) -> None:
        """Drop a worker that has died since its last run."""
        if self._model is not None and self._model.engine.lost:
            try:
                await in_thread(self._model.engine.check)  # which ends what is left of it
            except RKEdgeError as error:
                await self.lost(error)

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
            folder = _folder(settings)  # a link may change at any time, during the load too
            model = await in_thread(self._load, replace(settings, bundle=folder), self._stop)
        except Exception as error:  # even a defect of ours must not be met each second, nor end a reload
            failure = _of_load(error)
            if is_defect(failure):
                log.exception("loading %s", self.name)
            elif self._stop.asked:
                raise ServiceError(
                    "The daemon is stopping, so it loads no model.", hint="Ask again when it is back."
                ) from error
            self._failed(failure, _RETRY_S)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._loading = None
        self._model, self._loaded_from, self.error = model, folder, None
        self.loaded_with, self.name = settings, model.bundle.manifest.name
        log.info("loaded %s in %.1f s", model.bundle.manifest.name, time.monotonic() - start)
        return model

    def _failed(self, error: RKEdgeError, due_s: float | None = None) -> None:
        """Note an error; the model is `due` again after `due_s` seconds, None for as long as requests must pause."""
        self._failures += 1
        now, pause = time.monotonic(), _BACKOFF[min(self._failures, len(_BACKOFF)) - 1]
        self._next_try, self._due_at = now + pause, now + (pause if due_s is None else due_s)
        self.error = error
        log.error("%s: %s", type(error).__name__, error.message)

    def succeeded(self) -> None:
        """Reset the count of failures, because an answer or an embedding was completed."""
        self._failures = 0

    async def lost(self, error: RKEdgeError) -> None:
        """Drop a worker that is gone; a new one is started when it is `due`, or for the next request."""
        self._failed(error)
        self.restarts += 1
        await self._drop()

    def stop(self) -> None:
        """Stop the current load, and do not start another."""
        self._stop.ask()

    async def close(self) -> None:
        """Stop loading, and free the model."""
        self.stop()
        await self.unload()

    async def unload(self) -> None:
        """Unload the model, which frees the NPU, until somebody asks for it again."""
        self._wanted = False
        await self._settled()
        self.error = None
        await self._drop()

    async def _settled(self) -> None:
        """Wait for a load in progress, perhaps for a client that is gone."""
        if self._loading is not None:
            await asyncio.wait({self._loading})

    async def _drop(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            await in_thread(model.close)
            log.info("unloaded %s", model.bundle.manifest.name)

    def needs_load(self, settings: Settings) -> bool:
        """Whether these settings need a load: other options, a link to another folder, or another bundle in the folder.

        Reads files. Raises BundleError if the folder no longer has a bundle.
        """
        model = self._model
        known = [each for each in (self.settings, self.loaded_with if model else None) if each]
        if any(name != "bundle" for each in known for name in changed(each, settings, "load")):
            return True
        folder = _folder(self.settings)
        if {folder, self._loaded_from or folder} != {_folder(settings)}:
            return True
        return model is not None and settings.bundle is not None and _bundle(settings).manifest != model.bundle.manifest

    async def change(self, settings: Settings) -> None:
        """Apply other settings, with another bundle if they name one; if the model does not load, restore the old one.

        Raises:
            RKEdgeError: The new bundle is damaged, so that the old model stayed loaded; or the new model did not load.
        """
        await self._settled()
        before = replace(self.settings, bundle=self._loaded_from or self.settings.bundle)
        try:
            await in_thread(self._check, settings, self._stop)
        except RKEdgeError:
            self.settings = before
            raise
        wanted = self._wanted
        self.settings, self._loaded_from = settings, None
        await self.unload()
        self._failures, self._next_try, self.error = 0, 0.0, None
        self.name = await in_thread(_name, settings)
        if not wanted and not settings.load_at_start:
            return
        try:
            await self.model()
        except RKEdgeError:
            self.settings, self._next_try = before, 0.0
            self.name = await in_thread(_name, before)
            with suppress(RKEdgeError):
                await self.model()
            raise
