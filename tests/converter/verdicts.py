"""The expected verdict and sentence of every cell: type x SoC x release x size, from the sources of the table.

`python tests/converter/verdicts.py` prints verdicts.csv anew, for review as a diff. It reads the two tables as plain
YAML and applies them by itself, so that it does not repeat a mistake of rkconvert. A row stands for a range of
releases that say the same.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterator
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "converter/rkconvert/dtype_rules.yaml").read_text())
VERSIONS = yaml.safe_load((ROOT / "converter/rkconvert/toolkit/versions.yaml").read_text())
CONFIGS = json.loads((ROOT / "tests/data/gemma_configs.json").read_text())
# Published numbers of weights (model cards' "Model size" on the hub), and the demo model's for the small end.
SIZES = {
    "demo": 1_116_288,
    "gemma-1.1-2b-it": 2_506_172_416,
    "gemma-2-2b-it": 2_614_341_888,
    "gemma-1.1-7b-it": 8_537_680_896,
    "gemma-2-9b-it": 9_241_705_984,
    "gemma-2-27b-it": 27_227_128_320,
}
# The two releases before those that can be used, and all since.
RELEASES = ["1.0.0", "1.0.1", *VERSIONS["known_releases"]]


class Row(NamedTuple):
    soc: str
    type: str
    model: str
    first_release: str
    last_release: str
    verdict: str
    evidence: str
    sentence: str


def number(release: str) -> list[int]:
    """1.2.1b1 counts as 1.2.1."""
    return [int(part) for part in release.split("b")[0].split(".")]


def applies(rule: dict[str, Any], soc: str, dtype: str, release: str, weights: int) -> bool:
    first, last = rule.get("toolkit", ["0", "999"])
    least, below = rule.get("parameters", [0, math.inf])
    return (
        rule.get("platform", soc) == soc
        and dtype in rule["types"]
        and number(first) <= number(release) <= number(last)
        and least <= weights < below
    )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def cell(soc: str, dtype: str, release: str, model: str) -> tuple[str, str, str]:
    """Verdict, evidence and sentence: the first rule's, with the model's own numbers."""
    weights = SIZES[model]
    rule = next(rule for rule in RULES["rules"] if applies(rule, soc, dtype, release, weights))
    group = re.search(r"_g(\d+)", dtype)
    scales = weights / int(group[1]) * 4 if group else 0
    sentence = rule["reason"].format(
        name=model,
        dtype=dtype,
        platform=soc,
        weights=gigabytes(weights),
        scales=gigabytes(scales),
        total=gigabytes(weights + scales),
        half=gigabytes(2 * weights),
        domains=-(-int(weights + scales) // 2**32),
    )
    return rule["verdict"], rule["evidence"], sentence


def table() -> Iterator[Row]:
    for soc, dtype, model in product(RULES["platforms"], RULES["known_types"], SIZES):
        cells = [(cell(soc, dtype, release, model), release) for release in RELEASES]
        for said, alike in groupby(cells, itemgetter(0)):
            releases = [release for _, release in alike]
            yield Row(soc, dtype, model, releases[0], releases[-1], *said)


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(table())


if __name__ == "__main__":
    main()
