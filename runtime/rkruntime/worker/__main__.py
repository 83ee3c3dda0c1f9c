"""The worker's start: `python -m rkruntime.worker COMMAND_FD RECORD_FD`, from rkruntime.worker.process only."""

import sys

from rkruntime.worker.child import main

main(int(sys.argv[1]), int(sys.argv[2]))
