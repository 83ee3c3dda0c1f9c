"""Answers from a bundle on the NPU of an RK3588 board, or from the emulator on any PC.

    import rkruntime

    with rkruntime.open_model("my-bundle") as model:
        print(model.ask("What does NPU mean?").text)

What is not in `__all__` is private and changes without notice. `rkruntime.testing` has a fake engine for tests.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkruntime.bundle.manifest import Bundle, Manifest, open_bundle
    from rkruntime.checks.diagnosis import Diagnosis, diagnose
    from rkruntime.checks.preflight import Finding, Preflight, preflight
    from rkruntime.engine.engine import Engine
    from rkruntime.engine.generation import Finished, FinishReason, Perf, Request, Sampling, Token
    from rkruntime.engine.loading import LoadOptions, Lora, ModelInfo
    from rkruntime.engine.open import RuntimeOptions, SamplingOptions
    from rkruntime.errors import RKEdgeError
    from rkruntime.library.identify import Identity, identify
    from rkruntime.model import Chat, Model, open_model
    from rkruntime.selftest import SelfTestResult, run_selftest
    from rkruntime.stop import Stop
    from rkruntime.text.answer import Answer
    from rkruntime.text.conversation import Conversation
    from rkruntime.text.template import Message

__all__ = [
    "Answer",
    "Bundle",
    "Chat",
    "Conversation",
    "Diagnosis",
    "Engine",
    "Finding",
    "FinishReason",
    "Finished",
    "Identity",
    "LoadOptions",
    "Lora",
    "Manifest",
    "Message",
    "Model",
    "ModelInfo",
    "Perf",
    "Preflight",
    "RKEdgeError",
    "Request",
    "RuntimeOptions",
    "Sampling",
    "SamplingOptions",
    "SelfTestResult",
    "Stop",
    "Token",
    "diagnose",
    "identify",
    "open_bundle",
    "open_model",
    "preflight",
    "run_selftest",
]

# Each is imported on first use: the worker, which has only the standard library, imports this module too.
_HOMES = {
    "bundle.manifest": ("Bundle", "Manifest", "open_bundle"),
    "checks.diagnosis": ("Diagnosis", "diagnose"),
    "checks.preflight": ("Finding", "Preflight", "preflight"),
    "engine.engine": ("Engine",),
    "engine.generation": ("FinishReason", "Finished", "Perf", "Request", "Sampling", "Token"),
    "engine.loading": ("LoadOptions", "Lora", "ModelInfo"),
    "engine.open": ("RuntimeOptions", "SamplingOptions"),
    "errors": ("RKEdgeError",),
    "library.identify": ("Identity", "identify"),
    "model": ("Chat", "Model", "open_model"),
    "selftest": ("SelfTestResult", "run_selftest"),
    "stop": ("Stop",),
    "text.answer": ("Answer",),
    "text.conversation": ("Conversation",),
    "text.template": ("Message",),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'rkruntime' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rkruntime.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
