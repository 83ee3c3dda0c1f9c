"""A library that prints or talks without end: the daemon answers, keeps its time limits, and can be stopped."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SETTINGS = "library: {library}\nforce: true\nlimits: {{load_s: 2, token_s: 2, request_s: 30}}\n"


@pytest.fixture
def flooding(
    start_daemon: Callable[..., Any], double: Callable[..., Path], bundles: dict[str, Path], tmp_path: Path
) -> Callable[..., Any]:
    """Starts a daemon over the library that misbehaves."""
    bundle = Path(shutil.copytree(bundles["base"], tmp_path / "bundle"))
    manifest = bundle / "rkedge.yaml"
    manifest.write_text(manifest.read_text().replace("npu_cores: 3", "npu_cores: 1"))  # for machines of two cores

    def start(behaviour: str, **options: Any) -> Any:
        settings = SETTINGS.format(library=double("1.2.3"))
        return start_daemon(settings, bundle=bundle, RKDOUBLE=behaviour, **options)

    return start


def ask(daemon: Any) -> tuple[int, Any]:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    status, _, answer = daemon.request("POST", "/v1/chat/completions", body)
    return status, answer


def test_a_run_that_floods(flooding: Callable[..., Any]) -> None:
    daemon = flooding("token-flood-for-ever")
    results: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: results.append(ask(daemon)))
    asking.start()
    while asking.is_alive():
        began = time.monotonic()
        assert daemon.request("GET", "/health")[0] == 200
        assert time.monotonic() - began < 2  # a generous bound: it must not wait for the flood's end
        time.sleep(0.05)
    status, answer = results[0]
    assert status == 502, answer
    assert "did not respond" in answer["error"]["message"]


def test_a_load_that_floods_and_a_stop(flooding: Callable[..., Any]) -> None:
    daemon = flooding("init-flood-for-ever", wait=False)
    assert daemon.request("GET", "/health")[0] == 200
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "failed")
    assert "did not respond for 2 seconds" in daemon.log


def test_a_stop_in_the_middle_of_a_flood(flooding: Callable[..., Any]) -> None:
    daemon = flooding("token-flood-for-ever")
    asking = threading.Thread(target=ask, args=(daemon,))
    asking.start()
    time.sleep(0.5)
    assert daemon.stop() == 0
    asking.join()
