"""Tell the process that opened a resource from its forks, which must not use it."""

from __future__ import annotations

import os

from rkruntime.errors import RunError


class Owner:
    """The process that made this object. A fork shares its pipes and knows its children's ids."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether the current process is the owner, not a fork of it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise RunError in a fork."""
        if os.getpid() != self._pid:
            raise RunError(
                "The model was opened before this process was forked, and belongs to its parent.",
                hint="Open it after the fork, in the process that uses it.",
            )
