"""What `rkedge deploy` runs on a board, as root: the standard library alone, sent over ssh, for Python 3.9 or later.

Its modules are sent as text, in the order of ORDER, and find each other in `sys.modules`; none of them is installed.
"""

from typing import Final

ORDER: Final = ("ground", "follow", "store", "service", "steps", "program", "talk")
# The prefix of each line of an answer.
MARK: Final = b"RKEDGE-DEPLOY "
