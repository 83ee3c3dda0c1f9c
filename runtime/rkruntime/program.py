"""Start rkedge in a process of its own."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Final

_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from rkruntime.cli import main; sys.exit(main())"
)


def start() -> int:
    """The console script: the command line, which Ctrl-C also ends without a traceback while it is being imported."""
    try:
        status: int = importlib.import_module("rkruntime.cli").main()
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130
    return status


def own_command(*words: str) -> list[str]:
    """The command line of this very rkedge with these words.

    Isolated, as the current folder may hold modules of anybody; what this process found is passed on.
    """
    paths = [path for path in sys.path if path.startswith("/")]
    return [sys.executable, "-I", "-c", _START, json.dumps(paths), *words]
