"""The command `aider`, as a person types it with one question."""

import os
import subprocess
import sys
from pathlib import Path

from harness import LONG, QUESTION, URL, tried


def aider(text: str) -> str:
    words = ["--model", "openai/any", "--openai-api-base", f"{URL}/v1", "--openai-api-key", "none", "--no-git"]
    words += ["--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-pretty", "--edit-format", "ask"]
    words += ["--map-tokens", "0", "--no-analytics", "--timeout", "60", "--message", text]
    command = [str(Path(sys.executable).with_name("aider")), *words]
    done = subprocess.run(
        command, cwd=os.environ["HOME"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    return done.stdout + done.stderr


tried("aider answers")(lambda: aider(QUESTION))
tried("aider says that it is long")(lambda: aider(LONG))
