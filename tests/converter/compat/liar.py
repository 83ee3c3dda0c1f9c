"""Stands for ssh and a board that says what a file has: `python liar.py FILE -- DESTINATION rkedge visit ...`."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any


def tell(**event: Any) -> None:
    print(f"RKEDGE-VISIT {json.dumps(event)}", flush=True)


def main() -> None:
    said = json.loads(Path(sys.argv[1]).read_text())
    words = sys.argv[sys.argv.index("visit") + 1 :]
    if words[0] != "try":
        if words[0] == "receive":
            sys.stdin.buffer.read()
        return tell(event=words[0], **said["answers"][words[0]])
    for step in (word for before, word in pairwise(words) if before == "--step"):
        results = {"load": said["load"], "selftest": {"result": "same", "right": True, "says": "."}}
        tell(event="begin", step=step)
        tell(event="done", step=step, result=results.get(step, {"result": "", "says": "."}))
    return tell(event="end")


if __name__ == "__main__":
    main()
