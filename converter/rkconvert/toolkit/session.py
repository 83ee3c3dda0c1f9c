"""The worker process: started with a clean environment, watched, and killed with everything it started.

It leads its own session, so that nothing of it outlives the conversion, whether that is done, a callback raises, Ctrl-C
is pressed, the worker shows no activity, or this process dies.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rkconvert.toolkit.events import (
    MAX_LINE,
    Done,
    Event,
    Failure,
    Heartbeat,
    Notice,
    Progress,
    Stage,
    StageDone,
    WorkerEvent,
    parse_event,
)
from rkconvert.toolkit.interpreter import WORKER, Toolkit, clean_environment
from rkconvert.toolkit.job import Calls
from rkconvert.toolkit.output import Output
from rkconvert.toolkit.watchdog import Watchdog, is_running, out_of_memory_kills, peak_memory
from rkruntime.errors import HostError

_TICK: Final = 0.25
_HEARTBEAT: Final = 1.0
# Seconds to exit once everything has returned: interpreters that loaded torch take a moment, and some never do.
_GRACE: Final = 30.0
# Seconds to read the rest of a dead session's output: it is there at once, but an escaped process may hold pipes open.
_DRAIN: Final = 2.0
_BLOCK: Final = 1 << 16
_MOST_WARNINGS: Final = 100
_MORE_WARNINGS: Final = "(more warnings are in the log)"

VERIFY: Final = "verify"

OnEvent = Callable[[Event], None]


@dataclass
class WorkerRun:
    """One run of the worker: what it is given, and, once `execute` has returned, what happened.

    Attributes:
        calls: Calls that it is to make.
        scratch: Its working folder; nothing should be written elsewhere.
        patience: Seconds without activity after which it is killed.
        stage: Last stage that started.
        outcome: Its last event, or None if it broke off.
        exit_code: Exit code; negative for a signal.
        hung: Whether it was killed because it showed no activity, or took too long for the logits.
        stopped: Whether Ctrl-C ended the computation of logits.
        out_of_memory_kills: Processes on this machine that the kernel killed for lack of memory meanwhile.
        peak_memory: Peak memory of the worker, in bytes.
        seconds: Seconds by stage.
        warnings: The toolkit's own warnings and errors, each once.
    """

    toolkit: Toolkit
    calls: Calls
    scratch: Path
    output: Output
    on_event: OnEvent
    patience: float
    stage: str = ""
    outcome: Done | Failure | None = None
    exit_code: int = 0
    hung: bool = False
    stopped: bool = False
    peak_memory: int = 0
    out_of_memory_kills: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    _pending: bytes = b""
    _deadline: float = 0.0
    _latest: float = math.inf

    @property
    def failure(self) -> Failure | None:
        """The event with which the worker gave up, if it did."""
        return self.outcome if isinstance(self.outcome, Failure) else None

    @property
    def exported(self) -> bool:
        """Whether every step that makes files returned 0."""
        return isinstance(self.outcome, Done) or self.stage == VERIFY

    @property
    def ending(self) -> str:
        """How the worker failed, in words; empty if it did not."""
        if isinstance(self.outcome, Done):
            return ""
        if self.failure is not None:
            return self.failure.message.removesuffix(".")
        if self.stopped:
            return "it was stopped"
        if self.hung and self.stage == VERIFY:
            return f"it did not end within {self.patience:,.0f} s"
        if self.hung:
            return f"it showed no activity for {self.patience:,.0f} s"
        if self.killed:
            return "it was killed, which the kernel does when memory runs out"
        return f"it ended with signal {-self.exit_code}" if self.exit_code < 0 else f"it ended with {self.exit_code}"

    @property
    def killed(self) -> bool:
        """Whether a signal 9 that is not ours killed the worker; a shell script around the interpreter reports 137."""
        return not (self.hung or self.stopped) and self.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL)

    def execute(self) -> None:
        """Start the worker, hand it the job, and listen until it and everything it started have exited.

        Raises:
            HostError: The interpreter cannot be started.
        """
        kills = out_of_memory_kills()
        events_in, events_out = os.pipe()
        python = self.toolkit.python
        caches = {"HF_HOME": str(self.scratch / "cache"), "XDG_CACHE_HOME": str(self.scratch / "cache")}
        try:
            process = subprocess.Popen(
                [str(python), "-I", "-u", "-X", "utf8", str(WORKER), str(events_out)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(events_out,),
                start_new_session=True,
                cwd=self.scratch,
                env=clean_environment(python, caches),
                bufsize=0,
            )
        except OSError as error:
            os.close(events_in)
            message = f"{python} cannot be started: {error.strerror or error}."
            raise HostError(message, hint="Run `rkedge toolkit info`.") from error
        finally:
            os.close(events_out)
        try:
            self._send(process)
            try:
                self._listen(process, events_in)
            except KeyboardInterrupt:
                if self.stage != VERIFY:
                    raise
                self.stopped = True  # the files are there, and only the comparison is given up
        finally:
            end_session(process)
            os.close(events_in)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self.exit_code = process.returncode
        self.out_of_memory_kills = out_of_memory_kills() - kills

    def _send(self, process: subprocess.Popen[bytes]) -> None:
        # Standard input stays open: the worker kills its session when the other end is closed.
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # The worker died before reading; its output says why.
            process.stdin.write(self.calls.document().encode())

    def _listen(self, process: subprocess.Popen[bytes], events_in: int) -> None:
        assert process.stdout is not None
        watchdog = Watchdog(process.pid)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, self._take_output)
            selector.register(events_in, selectors.EVENT_READ, self._take_events)
            while selector.get_map():
                for key, _ in selector.select(_TICK):
                    watchdog.feed()
                    if data := os.read(key.fd, _BLOCK):
                        key.data(data)
                    else:
                        selector.unregister(key.fileobj)
                self._watch(process, watchdog)
                if self._deadline and time.monotonic() > self._deadline + _DRAIN:
                    break
        for event in self.output.finish():
            self._take(event)

    def _watch(self, process: subprocess.Popen[bytes], watchdog: Watchdog) -> None:
        """Send a heartbeat when one is due, and kill the session when its time is up; called once per tick."""
        now = time.monotonic()
        if watchdog.heartbeat_due(_HEARTBEAT):
            self.peak_memory = max(self.peak_memory, peak_memory(process.pid))
            self.on_event(Heartbeat(watchdog.seconds, self.peak_memory))
        if has_ended(process):
            # Its children may live on, and hold its output open.
            self._deadline = min(self._deadline or now, now)
        elif self.outcome is not None:
            self._deadline = self._deadline or now + _GRACE
        elif watchdog.idle_seconds() > self.patience or now > self._latest:
            self.hung, self._deadline = True, now
        if self._deadline and now >= self._deadline:
            end_session(process)

    def _take_output(self, data: bytes) -> None:
        for event in self.output.feed(data):
            self._take(event)

    def _take_events(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._take(parse_event(line))
        if len(self._pending) > MAX_LINE:
            parse_event(self._pending)

    def _take(self, event: WorkerEvent | Progress | Notice) -> None:
        if isinstance(event, Stage):
            self.stage = event.stage
            # Some prompts' logits take minutes at most, and a kill would cost the files that are made by then.
            self._latest = time.monotonic() + self.patience if event.stage == VERIFY else math.inf
        elif isinstance(event, StageDone):
            self.seconds[event.stage] = event.seconds
        elif isinstance(event, Done | Failure):
            self.outcome = event
        elif isinstance(event, Notice) and event.level != "info":
            self.warnings[event.text if len(self.warnings) < _MOST_WARNINGS else _MORE_WARNINGS] = None
        self.on_event(event)


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has exited, without reaping it, so that its PID cannot be reused yet."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads its own group, and the rest of that group. Its exit code is kept."""
    if process.returncode is not None:
        return
    # The leader has not been reaped yet, so its group ID cannot have been reused.
    os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + _DRAIN
    while is_running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.wait()
