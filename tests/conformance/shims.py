"""What other people's programs need around them so that they run here: nothing in their own files is changed.

`sudo` does nothing, limits are asked for no higher than they can be, and servers listen on loopback only.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_SUDO = "#!/bin/sh\n# There are no clocks to fix.\nexit 0\n"
_SITE = '''\
import os
import resource

_setrlimit = resource.setrlimit


def setrlimit(which, limits):
    """No more than the hard limit, which only root can raise."""
    hard = resource.getrlimit(which)[1]
    _setrlimit(which, tuple(limit if hard == resource.RLIM_INFINITY else min(limit, hard) for limit in limits))


resource.setrlimit = setrlimit

import flask

_run = flask.Flask.run


def run(self, host=None, port=None, **options):
    """On loopback, whatever the program asks for."""
    _run(self, host="127.0.0.1", port=int(os.environ["CONFORMANCE_PORT"]), **options)


flask.Flask.run = run
'''


def environment(folder: Path, port: int) -> dict[str, str]:
    """Variables for a server that runs in `folder`, which gets the shims."""
    shims = folder / "shims"
    shims.mkdir()
    (shims / "sudo").write_text(_SUDO)
    (shims / "sudo").chmod(0o755)
    (shims / "sitecustomize.py").write_text(_SITE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RKEMU_", "PYTHON", "VIRTUAL"))}
    return kept | {
        "PATH": f"{shims}:{os.environ['PATH']}",
        "PYTHONPATH": str(shims),
        "PYTHONUNBUFFERED": "1",
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "CONFORMANCE_PORT": str(port),
    }


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
