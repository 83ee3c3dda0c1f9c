"""Run all benchmarks, or those named: `python -m tests.bench [NAME ...]`. Each is a module of its own with a `main`.

What they found goes to docs/benchmarks.json and docs/benchmarks.md. The exit status is 1 if one did not end or missed
an aim.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import _page
from tests.bench._report import RESULT_VARIABLE


def _run(name: str, result: Path) -> tuple[dict[str, Any] | None, bool]:
    """What a benchmark found, if it came to its end, and whether all went well."""
    print(f"== {name}", flush=True)
    environment = {**os.environ, RESULT_VARIABLE: str(result)}
    status = subprocess.run([sys.executable, "-m", f"tests.bench.{name}"], env=environment, check=False).returncode
    return json.loads(result.read_text()) if result.exists() else None, status == 0


def main() -> int:
    known = _page.benchmarks()
    names = sys.argv[1:] or known
    if unknown := set(names) - set(known):
        sys.exit(f"no benchmark named {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    found, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            document, well = _run(name, Path(folder) / name)
            if document:
                found[name] = document
            if not well:
                failed.append(name if document else f"{name} (it did not end)")
    _page.collect(found, known)
    print(f"written: {_page.PAGE} and {_page.FIGURES.name}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
