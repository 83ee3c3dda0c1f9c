"""`rkedge serve` that asks for clocks at another socket: python -m tests.clocks.serving ..."""

import os
import sys
from pathlib import Path

from rkruntime import cli
from rkruntime.serve import clocks

clocks.SOCKET = Path(os.environ["TEST_CLOCKS"])  # type: ignore[misc]
if __name__ == "__main__":
    sys.exit(cli.main())
