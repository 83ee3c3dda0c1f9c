"""Every error a user can meet, in one tree.

    RKEdgeError                       exit
    ├── UsageError                      2   the command line or a setting is wrong
    │   └── BodyError                       a request to the daemon is wrong
    ├── InputError                      3   an input file is not what it should be
    │   ├── CheckpointError                 model folder, shard, index, config
    │   ├── AdapterError                    LoRA folder
    │   ├── BundleError                     rkedge.yaml or a file it names
    │   ├── ModelFileError                  .rkllm / .rkemu container
    │   ├── CalibrationError                texts for the quantizer
    │   ├── InvalidResultError              what somebody measured on a board
    │   └── OutputError                     where to write the output
    ├── RefusedError                    4   possible to try, but known not to work
    │   └── ContextFullError                a conversation has more tokens than the context holds
    ├── HostError                       5   this machine lacks something: compiler, toolkit, disk, memory
    ├── LibraryError                    6   librkllmrt.so: not a library, unknown release, contradiction
    │   └── UnsupportedCallError            the loaded release has no such call or field
    ├── ModelError                      7   the library refused or broke
    │   ├── LoadError                       a load that failed
    │   ├── RunError                        a run that failed; the model stays loaded
    │   ├── ToolkitError                    rkllm-toolkit refused the model or broke
    │   └── WorkerError                     the worker process is gone
    │       ├── WorkerCrashedError              it died of a signal, or exited
    │       ├── WorkerHungError                 no answer within the time limit
    │       └── WorkerProtocolError             it sent something that breaks the protocol
    └── ServiceError                    8   the daemon cannot be reached, or refused the request
        ├── BusyError                       too many requests are waiting, or this one waited too long
        ├── TimeLimitError                  an answer took longer than the daemon allows
        └── NoSuchSessionError              no conversation with that name

A message says what happened, `hint` what to do next. Commands print both; only --debug adds the traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class RKEdgeError(Exception):
    """Root of the tree.

    Args:
        message: What happened, in plain words, without a traceback.
        hint: Next step; defaults to the class's own hint.
        details: Facts for `--json` (JSON types only), such as a diagnosis or the last log lines.
    """

    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = "Run it again as `rkedge --debug ...` and report the output."

    def __init__(self, message: str, *, hint: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        self.details = dict(details or {})

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines of the program that failed: the vendor's library, its toolkit, pip, a compiler."""
        lines = self.details.get("lines") or self.details.get("log")
        return tuple(map(str, lines)) if isinstance(lines, (list, tuple)) else ()  # the toolkit's log is a file

    def as_dict(self) -> dict[str, Any]:
        """Return the error as `--json` prints it: `{"error", "message", "hint", "details"}`."""
        return {"error": type(self).__name__, "message": self.message, "hint": self.hint, "details": self.details}


class UsageError(RKEdgeError):
    """The command line or a setting is wrong."""

    exit_code = 2
    default_hint = "Correct what the message names, and try again."


class BodyError(UsageError):
    """A request to the daemon is wrong. `details["param"]` names the field."""

    default_hint = "docs/serve.md says what the daemon takes."


class InputError(RKEdgeError):
    """An input file is not what it should be."""

    exit_code = 3
    default_hint = "Check the path, and that the download or copy is complete."


class CheckpointError(InputError):
    """A model folder, shard, index or config that cannot be used."""

    default_hint = "Download the checkpoint again: a folder with config.json, tokenizer.json and *.safetensors."


class AdapterError(InputError):
    """A LoRA adapter that cannot be used with this base."""

    default_hint = "Give a folder written by peft's save_pretrained, for an adapter trained on this base model."


class BundleError(InputError):
    """A bundle whose manifest or files are wrong."""

    default_hint = "Copy or convert it again: a complete bundle has rkedge.yaml and every file it lists."


class ModelFileError(InputError):
    """A model container (.rkllm, .rkemu) that is truncated, damaged or something else."""

    default_hint = "Compare its size and SHA-256 with the original, and copy or convert it again."


class CalibrationError(InputError):
    """Calibration data that the toolkit could not use, or that would do harm."""

    default_hint = "Make it with `rkedge calibrate`: a JSON list of objects with the strings `input` and `target`."


class InvalidResultError(InputError):
    """A board's result file that is not valid."""

    default_hint = "Ask whoever made the file for it once more, or take it out of the folder."


class OutputError(InputError):
    """The output cannot be written where it should be."""

    default_hint = "Name another place to write to, or remove what is there."


class RefusedError(RKEdgeError):
    """Something that could be tried, but is known not to work."""

    exit_code = 4
    default_hint = "Follow the advice above, or read docs/ on how to try it anyway."


class ContextFullError(RefusedError):
    """A conversation that has more tokens than the model's context holds."""

    default_hint = "Start a new conversation, shorten the text, or let the oldest turns be dropped."


class HostError(RKEdgeError):
    """This machine lacks something."""

    exit_code = 5
    default_hint = "Install or free what the message names, then run the command again."


class LibraryError(RKEdgeError):
    """A librkllmrt.so that must not be called."""

    exit_code = 6
    default_hint = "Name a librkllmrt.so with --library; `rkedge inspect FILE` tells what a file is."


class UnsupportedCallError(LibraryError):
    """The loaded release has no such call, field or mode."""

    default_hint = "Use the librkllmrt.so release that the message names."


class ModelError(RKEdgeError):
    """The library refused or broke."""

    exit_code = 7
    default_hint = "`rkedge diagnose` explains a saved log of the library or of the kernel (dmesg)."


class LoadError(ModelError):
    """A load that failed."""


class RunError(ModelError):
    """A run that failed; the model stays loaded."""


class ToolkitError(ModelError):
    """rkllm-toolkit refused the model or broke while it converted."""

    default_hint = "Read the lines of its log above; the message says where the whole log is."


class WorkerError(ModelError):
    """The worker process is gone; the next load starts a new one."""


class WorkerCrashedError(WorkerError):
    """The worker died of a signal, or exited on its own."""


class WorkerHungError(WorkerError):
    """The worker did not respond within its time limit and was killed."""


class WorkerProtocolError(WorkerError):
    """The worker, or a library within it, sent something that makes no sense; the worker was killed."""

    default_hint = "The library wrote to the worker's pipe, or corrupted its memory: use the vendor's, of this release."


class ServiceError(RKEdgeError):
    """The daemon cannot be reached, or refused the request."""

    exit_code = 8
    default_hint = "On the board, run: systemctl status rkedge, and journalctl -u rkedge."


class BusyError(ServiceError):
    """Too many requests are waiting already, or this one waited too long. `details["retry_after_s"]` is an estimate."""

    default_hint = "Try again later; the daemon's settings say how many may wait and how long."


class TimeLimitError(ServiceError):
    """An answer took longer than the daemon allows, and was stopped."""

    default_hint = "Ask for fewer tokens, or raise limits.request_s in the daemon's settings."


class NoSuchSessionError(ServiceError):
    """There is no conversation with that name."""

    default_hint = "GET /sessions lists the existing ones."
