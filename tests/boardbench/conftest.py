"""The measurement on boards behind ssh."""

from tests.forced import board, forced  # noqa: F401
