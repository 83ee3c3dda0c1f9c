"""Daemons, as the tests of the daemon start them."""

from tests.runtime.serve.conftest import bundles, start_daemon  # noqa: F401
