"""A bundle that `rkedge compat --board` sent to this board to be tried out, and removes afterwards."""

from typing import Final

# What an answer's line begins with, and the number of this way to ask and answer.
MARK: Final = b"RKEDGE-VISIT "
PROTOCOL: Final = 1
