"""Try out a bundle that `rkedge compat --board` sends to this board, and removes afterwards."""

from typing import Final

# The mark with which an answer's line begins, and the version of this protocol.
MARK: Final = b"RKEDGE-VISIT "
PROTOCOL: Final = 1
