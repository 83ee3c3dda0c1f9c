"""What programs of others run with: an interpreter with what they import, their source, and the demo model."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from rkconvert.demo import checkpoint

FLASK = "examples/rkllm_server_demo/rkllm_server/flask_server.py"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def interpreter(folder: Path) -> Path:
    """An interpreter with what the servers import, made once for these requirements."""
    key = hashlib.sha256(_REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    home = folder / f"conformance-{key}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print(f"installing what the servers import into {home}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", _REQUIREMENTS]
        subprocess.run(pip, check=True)
        (home / "complete").touch()
    return python


def demo_model(folder: Path) -> tuple[Path, Path]:
    """The demo model for the emulator, and its tokenizer in Hugging Face layout."""
    bundle = folder / "demo"
    options = ["--target", "emulator", "--quiet", "-o", bundle]
    subprocess.run([sys.executable, "-m", "rkruntime.cli", "convert", checkpoint(), *options], check=True)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for name in _TOKENIZER_FILES:
        shutil.copy(checkpoint() / name, tokenizer)
    return bundle / "model.rkemu", tokenizer


def from_git(repository: Path, tag: str, path: str) -> bytes:
    """A file of a checkout, as it is at a tag or commit."""
    shown = subprocess.run(["git", "-C", repository, "show", f"{tag}:{path}"], capture_output=True, check=False)
    if shown.returncode:
        sys.exit(f"{repository} has no {path} at {tag}: {shown.stderr.decode().strip()}")
    return shown.stdout


def rkllama_package(repository: Path, folder: Path) -> Path:
    """src/rkllama of the commit that is checked out, without libraries and wheels."""
    without = [f":(exclude,glob)**/*.{kind}" for kind in ("so", "whl")]
    archive = ["git", "-C", repository, "archive", "HEAD", "--", "src/rkllama", *without]
    packed = subprocess.run(archive, capture_output=True, check=False)
    if packed.returncode:
        sys.exit(f"{repository} is not a checkout of rkllama: {packed.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    return folder / "src" / "rkllama"
