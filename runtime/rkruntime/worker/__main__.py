"""The worker's start: `python -m rkruntime.worker COMMAND_FD RECORD_FD`, from rkruntime.worker.process only."""

import sys

from rkruntime.worker.keeper import keep

keep()

from rkruntime.worker.child import main  # noqa: E402 - the keeper stays as small as it can be

main(int(sys.argv[1]), int(sys.argv[2]))
