"""Daemons, as the tests of the daemon start them."""

from tests.forced import board, forced  # noqa: F401
from tests.runtime.serve.conftest import bundles, start_daemon  # noqa: F401
