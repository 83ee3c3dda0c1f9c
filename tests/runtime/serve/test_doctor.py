"""What `rkedge doctor` hears from a running daemon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from rkboard.doctor import probe as probe_module
from rkboard.doctor.checks.daemon import daemon_model
from rkboard.doctor.document import Board, Document, Read
from rkboard.doctor.probe import Probe


def test_a_daemon_with_its_model(start_daemon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = start_daemon(port=False)
    monkeypatch.setattr(probe_module, "SOCKET", str(daemon.socket))
    probe = Probe("/")
    probe.daemon()
    answer = probe.found["files"][str(daemon.socket).lstrip("/")]
    files = {"run/rkedge/rkedge.sock": Read(**answer)}
    found = {**probe.found, "me": None, "seconds": 0.0, "files": files}
    verdict = daemon_model(Board(Document(**found), time.time()))
    assert verdict is not None
    assert (verdict.status, verdict.said) == ("ok", "The daemon's model is ready.")
