"""The worker's entry point, for `process` only: `python -m rkruntime.engine.worker COMMAND_FD RECORD_FD`."""

import sys

from rkruntime.engine.worker.keeper import keep

keep()

from rkruntime.engine.worker.child import main  # noqa: E402 - the keeper stays as small as possible

main(int(sys.argv[1]), int(sys.argv[2]))
