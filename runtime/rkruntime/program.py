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
    """Return the command line that runs this very installation of rkedge with the given arguments.

    Python runs isolated, as the current folder may hold anybody's modules; the absolute import paths are passed on.
    """
    paths = [path for path in sys.path if path.startswith("/")]
    return [sys.executable, "-I", "-c", _START, json.dumps(paths), *words]
