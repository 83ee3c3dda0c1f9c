"""Other people's clients, unmodified, on the emulator.

    python -m tests.emulator.conformance [--vendor CHECKOUT of airockchip/rknn-llm] [--rkllama CHECKOUT]

The vendor's llm_demo.cpp and flask_server.py of 1.2.3 and 1.3.0 and rkllama's server each get all questions of the demo
model, and must give its answers letter by letter. Their sources are read from the checkouts with `git archive` into a
temporary folder. Only what is around them is ours: where the library lies, a `sudo` that does nothing, and a
`sitecustomize` that takes a smaller limit of open files where the machine allows no larger one, and binds to loopback.
The servers run in an environment of their own, made with pip in the cache folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rkboard import emulator
from rkruntime.rkemu import Writer, read_container

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "converter" / "rkconvert" / "demo"
VENDOR_RELEASES = ("1.2.3", "1.3.0")
CONTEXT = 4096  # what the vendor's servers ask for
# The vendor's servers lose what comes right before the end of a run; a board's pace leaves them the time of a token.
PACE = {"RKEMU_TOKEN_US": "10000"}
SERVER_PACKAGES = (
    "Flask==2.3.2", "Werkzeug<3", "requests==2.31.0", "flask-cors==6.0.1", "pydantic==2.11.9", "psutil==7.1.0",
    "pillow==11.3.0", "numpy==1.26.4", "opencv-python-headless==4.11.0.86", "python-dotenv==1.1.1",
    "transformers==4.57.6", "huggingface_hub==0.35.1",
)  # fmt: skip
SITE = """\
import os, resource
_setrlimit = resource.setrlimit
def setrlimit(which, limits):
    hard = resource.getrlimit(which)[1]
    _setrlimit(which, tuple(min(limit, hard) if hard >= 0 else limit for limit in limits))
resource.setrlimit = setrlimit
import flask
_run = flask.Flask.run
def run(self, host=None, port=None, **options):
    _run(self, "127.0.0.1", int(os.environ["CONFORMANCE_PORT"]), **options)
flask.Flask.run = run
"""


def questions() -> list[tuple[str, str]]:
    """Question and answer of the demo model."""
    return [(row["question"], row["answer"]) for row in yaml.safe_load((DEMO / "questions.yaml").read_text())]


def convert(folder: Path) -> tuple[Path, Path]:
    """The demo model for a context of CONTEXT, and the bundle that it was made from."""
    bundle = folder / "bundle"
    command = [
        sys.executable,
        "-m",
        "rkruntime.cli",
        "convert",
        DEMO / "checkpoint",
        "--target",
        "emulator",
        "-o",
        bundle,
    ]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    made = read_container(bundle / "model.rkemu")
    model = folder / "demo.rkllm"
    with Writer(
        model, made.metadata | {"rkllm.max_context": CONTEXT}, [t.spec for t in made.tensors.values()]
    ) as writer:
        for name in made.tensors:
            writer.write(name, made.read(name))
    return model, bundle


def checkout(repository: Path, revision: str, paths: tuple[str, ...], folder: Path) -> Path:
    """Files of a revision, without touching the checkout."""
    archive = subprocess.run(
        ["git", "-C", str(repository), "archive", revision, *paths], check=True, capture_output=True
    ).stdout
    folder.mkdir(parents=True)
    with tempfile.TemporaryFile() as file:
        file.write(archive)
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            tar.extractall(folder, filter="data")
    return folder


def environment(site: Path) -> Path:
    """An interpreter with the servers' packages, and `site` with our shims."""
    home = emulator.cache_folder().parent / "conformance"
    python = home / "bin" / "python"
    if not python.exists():
        print(f"making {home} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *SERVER_PACKAGES], check=True)
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(SITE)
    (site / "sudo").write_text("#!/bin/sh\nexit 0\n")
    (site / "sudo").chmod(0o755)
    return python


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: dict[str, Any]) -> str:
    """The answer of a server as text."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())


@contextlib.contextmanager
def server(command: list[str], folder: Path, site: Path, path: list[Path], log: Path) -> Iterator[str]:
    """A server process and its address, until the block ends."""
    port = free_port()
    variables = (
        os.environ
        | PACE
        | {
            "PATH": f"{site}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, [site, *path])),
            "CONFORMANCE_PORT": str(port),
            "HF_HUB_OFFLINE": "1",
            "RKEMU_NPU": str(site / "npu"),
        }
    )
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                break
            time.sleep(0.2)
        else:
            raise SystemExit(f"{command[0]} does not listen: see {log}")
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def report(name: str, wrong: list[str], total: int) -> bool:
    """Say how it went."""
    print(f"{name}: {total - len(wrong)} of {total} answers exact", flush=True)
    for line in wrong[:5]:
        print(f"  {line}")
    return not wrong


def compare(question: str, expected: str, got: str) -> list[str]:
    """What is wrong with an answer, as a list of one or no line."""
    return [] if got.strip() == expected else [f"{question!r}: {got!r} instead of {expected!r}"]


def llm_demo(repository: Path, release: str, model: Path, folder: Path) -> bool:
    """The vendor's C++ program, built by its own CMakeLists.txt and asked through stdin."""
    demo = "examples/rkllm_api_demo/deploy"
    api = "rkllm-runtime/Linux/librkllm_api"
    tree = checkout(repository, f"release-v{release}", (demo, f"{api}/include"), folder)
    for arch in ("aarch64", emulator.host_arch()):  # 1.2.3 links aarch64/ on any machine
        (tree / api / arch).mkdir(exist_ok=True)
        shutil.copy(emulator.build(release), tree / api / arch)
    build = folder / "build"
    subprocess.run(["cmake", "-S", tree / demo, "-B", build], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    asked = "".join(f"{question}\n" for question, _ in questions())
    variables = os.environ | {"RKEMU_NPU": str(folder / "npu")}
    done = subprocess.run(
        [build / "llm_demo", model, "512", "1024"], input=asked + "exit\n", capture_output=True, text=True,
        env=variables, timeout=300, check=True,
    )  # fmt: skip
    answers = [part.partition("\n\nuser: ")[0] for part in done.stdout.split("robot: ")[1:]]
    wrong = [line for (q, a), got in zip(questions(), answers, strict=True) for line in compare(q, a, got)]
    return report(f"llm_demo.cpp {release}", wrong, len(questions()))


def chat_body(question: str, stream: bool, **more: Any) -> dict[str, Any]:
    """A request of the vendor's servers and of OpenAI's form."""
    return {"model": "demo", "messages": [{"role": "user", "content": question}], "stream": stream} | more


def streamed(text: str) -> str:
    """The content of a stream of OpenAI chunks."""
    content = ""
    for line in text.splitlines():
        if line.startswith("data: {"):
            delta = json.loads(line[6:])["choices"][-1]["delta"]
            content += delta.get("content") or ""
    return content


def flask_server(repository: Path, release: str, model: Path, folder: Path) -> bool:
    """The vendor's HTTP server; its streaming too where it sends each piece once (1.3.0)."""
    demo = "examples/rkllm_server_demo/rkllm_server"
    tree = checkout(repository, f"release-v{release}", (demo,), folder / "tree") / demo
    shutil.copy(emulator.build(release), tree / "lib")
    (tree / "fix_freq_rk3588.sh").touch()
    python = environment(folder / "site")
    command = [str(python), "flask_server.py", "--rkllm_model_path", str(model), "--target_platform", "rk3588"]
    good = True
    with server(command, tree, folder / "site", [], folder / "log") as address:
        route = "/v1/chat/completions" if release == "1.3.0" else "/rkllm_chat"
        wrong = []
        for question, answer in questions():
            reply = json.loads(post(address + route, chat_body(question, False)))
            wrong += compare(question, answer, reply["choices"][-1]["message"]["content"])
        good = report(f"flask_server.py {release}", wrong, len(questions()))
        if release == "1.3.0":
            wrong = []
            for question, answer in questions():
                wrong += compare(question, answer, streamed(post(address + route, chat_body(question, True))))
            good = report(f"flask_server.py {release}, streamed", wrong, len(questions())) and good
    return good


def rkllama(repository: Path, model: Path, bundle: Path, folder: Path) -> bool:
    """rkllama's server by its Ollama and its OpenAI endpoint; it renders the template and sends token ids."""
    without = (":(exclude,glob)src/**/*.whl", ":(exclude,glob)src/**/*.so")
    tree = checkout(repository, "HEAD", ("src", *without), folder / "tree")
    shutil.copy(emulator.build("1.3.0"), tree / "src" / "rkllama" / "lib")
    home = folder / "models" / "demo"
    (home / "tokenizer").mkdir(parents=True)
    shutil.copy(model, home / "demo.rkllm")
    shutil.copy(bundle / "tokenizer.json", home / "tokenizer")
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
        "pad_token": "<pad>", "chat_template": (bundle / "chat_template.jinja").read_text(),
    }  # fmt: skip
    (home / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (home / "Modelfile").write_text(
        'FROM="demo.rkllm"\nHUGGINGFACE_PATH="demo/demo"\nSYSTEM=""\nTEMPERATURE=0.0\nTOP_K=1\nNUM_CTX=1024\n'
        "MAX_NEW_TOKENS=256\nREPEAT_PENALTY=1.0\nENABLE_THINKING=False\n"
    )
    python = environment(folder / "site")
    command = [str(python), "-m", "rkllama.server.server", "--processor", "rk3588", "--models", str(home.parent)]
    good = True
    with server(command, folder, folder / "site", [tree / "src"], folder / "log") as address:
        for name, route in (("Ollama", "/api/chat"), ("OpenAI", "/v1/chat/completions")):
            wrong = []
            for question, answer in questions():
                body = chat_body(question, False, options={"temperature": 0, "top_k": 1}, temperature=0, top_k=1)
                try:
                    reply = json.loads(post(address + route, body))
                except urllib.error.HTTPError as error:
                    wrong.append(f"{question!r}: {error.code} {error.read().decode()[:300]}")
                    continue
                message = reply["message"] if name == "Ollama" else reply["choices"][0]["message"]
                wrong += compare(question, answer, message["content"])
            good = report(f"rkllama, {name} endpoint", wrong, len(questions())) and good
    return good


def main() -> int:
    """Run what there are checkouts for; 0 if every answer is exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vendor", type=Path)
    parser.add_argument("--rkllama", type=Path)
    options = parser.parse_args()
    if not (options.vendor or options.rkllama):
        parser.error("name at least one checkout: make conformance VENDOR=... RKLLAMA=...")
    good = True
    with tempfile.TemporaryDirectory(prefix="conformance-") as name:
        folder = Path(name)
        model, bundle = convert(folder)
        for release in VENDOR_RELEASES if options.vendor else ():
            good = llm_demo(options.vendor, release, model, folder / f"llm_demo-{release}") and good
            good = flask_server(options.vendor, release, model, folder / f"flask-{release}") and good
        if options.rkllama:
            good = rkllama(options.rkllama, model, bundle, folder / "rkllama") and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
