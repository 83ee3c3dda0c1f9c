"""What each test leaves as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    """A daemon in a test's own process makes its files private, and with them those of every later test."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
