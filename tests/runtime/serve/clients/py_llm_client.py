"""The command `llm`, as a person types it."""

import os
import subprocess
import sys
from pathlib import Path

from harness import LONG, QUESTION, URL, tried

settings = Path(os.environ["HOME"]) / "llm"
settings.mkdir()
(settings / "extra-openai-models.yaml").write_text(
    f"- {{model_id: board, model_name: any, api_base: '{URL}/v1', supports_schema: true}}\n"
)


def llm(*words: str, text: str = "") -> str:
    command = [str(Path(sys.executable).with_name("llm")), *words]
    environment = {**os.environ, "LLM_USER_PATH": str(settings), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, env=environment, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout.strip()


tried("chat")(lambda: llm("-m", "board", "--no-stream", QUESTION))
tried("stream")(lambda: llm("-m", "board", QUESTION))
tried("goes on")(lambda: llm("-c", "Does it work?"))
tried("long")(lambda: llm("-m", "board", text=LONG))
tried("format")(lambda: llm("-m", "board", "--schema", "cores int", QUESTION))
