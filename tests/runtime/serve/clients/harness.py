"""For a program with somebody's client: what came of each call goes to standard output, as JSON."""

import atexit
import json
import os
from collections.abc import Callable

URL = os.environ["URL"]
QUESTION = "What is the RK3588?"
LONG = "word " * 6000
NOTHING = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "light", "description": "Turns it on.", "parameters": NOTHING}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
IMAGE = f"data:image/png;base64,{PIXEL}"
seen: dict[str, object] = {}
atexit.register(lambda: print(json.dumps(seen)))


def tried(name: str) -> Callable[[Callable[[], object]], None]:
    """Calls what it decorates; an exception counts as what a person reads whose program prints it."""

    def call(ask: Callable[[], object]) -> None:
        try:
            seen[name] = ask()
        except Exception as error:
            seen[name] = {"error": str(error), "kind": type(error).__name__}

    return call
