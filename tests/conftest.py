"""What each test leaves as it found it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Else each process that a test starts would compile all of RKEdge: a quarter of the time that many tests take.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell starts what is to run in the background with Ctrl-C ignored, and so would whatever a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
