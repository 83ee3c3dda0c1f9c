"""Speed and memory, beside others in one run; `make bench` runs each module here without an underscore."""

import os

# A user's Python keeps what it has compiled; without that, each start would compile all of RKEdge.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
