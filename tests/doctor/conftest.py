"""The doctor on boards behind ssh."""

from tests.forced import board, forced  # noqa: F401
