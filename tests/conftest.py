"""What each test leaves as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A machine that does other work too takes its time for an example, which says nothing of the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    """A daemon in a test's own process makes its files private, and with them those of every later test."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
