"""The C interface of librkllmrt.so as data: releases, layouts, fields, enums, callbacks, prototypes."""

from rkruntime.abi.releases import (
    CALLABLE,
    DEFAULT_RELEASE,
    EMULATED,
    LAYOUTS,
    RELEASES,
    Release,
    check_release,
    release_named,
    within,
)
from rkruntime.abi.types import Abi, Prototype, abi_of, since

__all__ = [
    "CALLABLE",
    "DEFAULT_RELEASE",
    "EMULATED",
    "LAYOUTS",
    "RELEASES",
    "Abi",
    "Prototype",
    "Release",
    "abi_of",
    "check_release",
    "release_named",
    "since",
    "within",
]
