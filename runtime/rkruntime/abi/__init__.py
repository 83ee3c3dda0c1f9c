"""The C interface of librkllmrt.so as data: releases, layouts, fields, enums, callbacks, prototypes."""

from rkruntime.abi.releases import CALLABLE, LAYOUTS, RELEASES, Release, release_named, sort_key, within
from rkruntime.abi.types import Abi, Prototype, abi_of, since

__all__ = [
    "CALLABLE",
    "LAYOUTS",
    "RELEASES",
    "Abi",
    "Prototype",
    "Release",
    "abi_of",
    "release_named",
    "since",
    "sort_key",
    "within",
]
