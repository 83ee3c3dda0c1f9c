"""What `rkedge deploy` runs on a board, as root: the standard library alone, sent over ssh, for Python 3.9 or later.

Its modules are sent as text, in the order of ORDER, and find each other in `sys.modules`; nothing of it is installed.
"""

from typing import Final

ORDER: Final = ("ground", "follow", "store", "service", "steps", "program", "talk")
# What an answer's line begins with, and the number of this way to ask and answer.
MARK: Final = b"RKEDGE-DEPLOY "
