"""What is read of the board for /status and /metrics."""

from pathlib import Path

import pytest

from rkruntime.checks.machine import npu_load


@pytest.mark.parametrize("name", ["proc/rknpu/load", "sys/kernel/debug/rknpu/load"])
def test_npu_load_is_read_wherever_the_kernel_shows_it(tmp_path: Path, name: str) -> None:
    assert npu_load(tmp_path) == {}
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("NPU load:  Core0: 25%, Core1:  0%, Core2: 100%,\n")
    assert npu_load(tmp_path) == {"core0": 0.25, "core1": 0.0, "core2": 1.0}
