"""`python -m rkruntime.cli`: the rkedge command."""

import sys

from rkruntime.cli import main

sys.exit(main())
