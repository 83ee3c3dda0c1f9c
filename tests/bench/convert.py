"""`rkedge convert` of a model of Gemma 2 2B's shape to the emulator, against torch that does the arithmetic only.

The source (about 5 GB, random weights, the demo's tokenizer) is in the page cache. torch reads it block by block, finds
the scale of each row, rounds, and writes values and scales: no hashes, no checksums, no check for NaN. rkedge hashes
source and result on one core while it works, so what SHA-256 of as many bytes takes there is a limit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench._machine import Cost, run, sha256_rate
from tests.bench._report import Report, at_most, pairs, turns
from tests.bench.merge import COSTS, RKEDGE, make_checkpoint, touch_memory

from rkconvert.demo import checkpoint

LIMITS = """
The aim is for two cores like those of the machine that it was set on (AMD EPYC of 2023) that do nothing else. This is
the emulator's format: how long the vendor's toolkit takes for a board's is not known here.
"""
TORCH = """
import pathlib, sys, torch
from safetensors import safe_open
source, out = map(pathlib.Path, sys.argv[1:])
torch.set_num_threads(2)
out.mkdir()
with (out / "values").open("wb") as values, (out / "scales").open("wb") as scales:
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                for first in range(0, part.get_shape()[0], 4096):
                    rows = part[first : first + 4096].float()
                    if rows.dim() == 1:
                        values.write(rows.numpy().data)
                        continue
                    scale = rows.abs().amax(1, keepdim=True) / 127
                    values.write((rows / scale).round().to(torch.int8).numpy().data)
                    scales.write(scale.numpy().data)
"""


def main() -> int:
    """Both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=26, help="fewer for a quick look; the aim is for 26")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; needs 12 GB")
    args = parser.parse_args()
    report = Report("convert", __doc__, limits=LIMITS)
    report.version_of("numpy", "torch", "safetensors")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        base, out = work / "base", work / "out"
        make_checkpoint(base, args.layers)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (checkpoint() / file).is_file():
                shutil.copy(checkpoint() / file, base)
        size = sum(file.stat().st_size for file in base.iterdir())

        limits: list[float] = []

        def way(*command: object, hashed: bool = False) -> Callable[[], Cost]:
            def work_once() -> Cost:
                touch_memory(work / "scratch", size // 2)
                cost = run([str(word) for word in command])
                if hashed:
                    written = sum(file.stat().st_size for file in out.rglob("*"))
                    limits.append((size + written) / sha256_rate())
                shutil.rmtree(out)
                return cost

            return work_once

        ways = {"rkedge convert": way(*RKEDGE, "convert", base, "-o", out, "--no-selftest", "--quiet", hashed=True)}
        if not args.no_torch:
            ways["torch"] = way(sys.executable, "-c", TORCH, base, out)
        found = turns(ways, pairs())
    for key, (what, unit) in COSTS.items():
        of = {name: [getattr(cost, key) for cost in costs] for name, costs in found.items()}
        whole = key == "wall_s" and args.layers == 26
        report.compare(f"{size / 1e9:.2f} GB: {what}", unit, of, aim=at_most(6.5) if whole else None)
    report.figure(f"{size / 1e9:.2f} GB: SHA-256 of source and result", "one core of this machine", limits, "s")
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
