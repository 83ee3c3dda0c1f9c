"""A sample as a table: plain text, or for a screen that is redrawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from rkboard.doctor.readings import mhz
from rkboard.top.sample import Daemon, Sample
from rkruntime.printable import one_line

if TYPE_CHECKING:
    from rich.table import Table

_BAR: Final = 24
# Degrees Celsius. In the vendor's device trees for the RK3588, throttling begins at 75 to 85.
_HOT: Final = 75.0


class Row(NamedTuple):
    """A line. `share`: 0 to 1, for a bar; `warn`: it deserves attention."""

    name: str
    value: str
    share: float | None = None
    warn: bool = False


def rows(sample: Sample) -> list[Row]:
    """Return the rows to show. Whatever a board has said is made a single line."""
    found = [*_npu(sample), *_clocks(sample), *_heat(sample), *_memory(sample), *_daemon(sample)]
    found += [Row(name, f"unknown: {why}") for name, why in sample.unknown.items()]
    return [Row(one_line(row.name), one_line(row.value), row.share, row.warn) for row in found]


def title(sample: Sample, destination: str | None) -> str:
    """Return the board's name, model and kernel."""
    parts = (destination or "this machine", sample.board, sample.kernel and f"Linux {sample.kernel}")
    return one_line(", ".join(filter(None, parts)))


def plain(sample: Sample) -> list[str]:
    """Return the rows as text."""
    found = rows(sample)
    width = max((len(row.name) for row in found), default=0)
    return [f"{row.name:{width}}  {row.value}" for row in found]


def table(sample: Sample, destination: str | None) -> Table:
    """Return the rows with bars, for rich."""
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(title(sample, destination), style="bold"), title_justify="left", box=None, show_header=False
    )
    made.add_column(style="dim", no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for row in rows(sample):
        style = "yellow" if row.warn else "dim" if row.value.startswith("unknown") else ""
        made.add_row(
            Text(row.name), Text(_bar(row.share), style="yellow" if row.warn else "green"), Text(row.value, style)
        )
    return made


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    return "█" * full + "░" * (_BAR - full)


def _npu(sample: Sample) -> Iterator[Row]:
    for core, share in sample.npu_load.items():
        yield Row(f"npu {core}", f"{share:.0%}", share)


def _clocks(sample: Sample) -> Iterator[Row]:
    for clock in sample.clocks:
        if clock.now is None:
            continue
        best = clock.best or clock.most
        of = f" of {mhz(best)}" if best else ""
        governor = f", {clock.governor[:40]}" if clock.governor else ""
        yield Row(f"clock {clock.name}", f"{mhz(clock.now)}{of}{governor}", clock.now / best if best else None)


def _heat(sample: Sample) -> Iterator[Row]:
    for name, degrees in sample.temperatures.items():
        yield Row(name[:40], f"{degrees:.0f} degrees", degrees / 100, degrees >= _HOT)
    for name, steps in sample.cooling.items():
        if steps:
            yield Row(name[:40], f"the kernel lowers clocks for heat, by {steps}", None, True)


def _memory(sample: Sample) -> Iterator[Row]:
    if sample.memory is not None:
        total, used = sample.memory.total, sample.memory.total - sample.memory.available
        yield Row("memory", f"{used / 1e9:.1f} of {total / 1e9:.1f} GB in use", used / total if total else None)


def _daemon(sample: Sample) -> Iterator[Row]:
    daemon = sample.daemon
    if daemon is None:
        return
    emulated = ", emulated" if daemon.emulated else ""
    yield Row(
        "daemon", f"{daemon.state or 'unknown'}: {daemon.model or 'no model'}{emulated}", None, daemon.state == "failed"
    )
    if daemon.tokens_per_s is not None:
        yield Row("tokens/s", f"{daemon.tokens_per_s:.1f}{emulated}")
    yield Row("requests", _requests(daemon))


def _requests(daemon: Daemon) -> str:
    busy, waiting = ("unknown" if count is None else str(count) for count in (daemon.busy, daemon.waiting))
    return f"{busy} in progress, {waiting} waiting"
