"""A stand-in for rkllm-toolkit, for the tests of RKEdge: NOT the vendor's toolkit, and it converts nothing.

It checks its arguments, prints and returns as the vendor's manuals and public reports say that the real one does (see
rkconvert/rules/versions.yaml for the pages; the texts are from issues of airockchip/rknn-llm), and writes a file with
the plain header that such files have. RKLLM_STANDIN_FAULT="STAGE:WHAT" makes it fail as the real one was seen to.

Python 3.8 and the standard library.
"""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import ClassVar

import torch
from rkllm_content import body, token_ids
from rkllm_logits import ask, spoiled

MAGIC = bytes.fromhex("daeeb336")
FAMILIES = ("Gemma2ForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM")


def bar(title, total, steps=4):
    """A tqdm bar on standard error, with carriage returns, as a program writes it that does not know its terminal."""
    for step in range(steps + 1):
        blocks = "█" * (10 * step // steps)
        done = total * step // steps
        sys.stderr.write(
            f"\r{title}: {100 * done // total:3d}%|{blocks:10}| {done}/{total} [00:0{step}<00:00, 45.59s/it]"
        )
        sys.stderr.flush()
    sys.stderr.write("\n")


def error(text):
    """What the toolkit does when something is wrong: a line, and -1."""
    print(f"ERROR: {text}")
    return -1


def name_paths():
    """Where things are on this machine, as Python and packages print it."""
    warnings.warn("pkg_resources is deprecated", stacklevel=1)
    print(
        f"WARNING: no file {tempfile.gettempdir()}/rkedge-calibration-x1/calibration.json, '{Path.cwd()}/a b/c d.json'"
    )
    print(f"WARNING: {sys.executable} and {Path.home()}/.cache/huggingface/x y, file://{Path.home()}/models/mine")
    print(f"WARNING: {Path(__file__).resolve()}:13: and/or 3/4 </s> https://github.com/airockchip/rknn-llm/issues")


def raise_it():
    raise RuntimeError("Catch exception when optimizing model: 'mlp.down_proj'")


def spin():
    """Busy and silent: that is not hung."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        pass


def leave_child():
    """A helper that lives on and holds the output open, as data set loaders do."""
    child = subprocess.Popen(["sleep", "1000"])
    print(f"INFO: child {child.pid}", flush=True)


def hang_with_child():
    leave_child()
    time.sleep(1000)


def chinese():
    """As on a machine with a Chinese locale, in GBK."""
    sys.stdout.buffer.write("错误：目标平台不支持该量化类型，请检查量化类型与目标平台的对应关系\n".encode("gbk"))
    sys.stdout.buffer.write(b"ERROR: target_platform: rk3588 not support quantized_dtype: w8a8!\n")
    return -1


def endless_line():
    sys.stdout.write("x" * 200_000)
    return -1


def forge_events():
    """Write into every pipe beyond standard error: only the worker's own can be among them."""
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and int(entry.name) > 2 and "pipe:" in os.readlink(entry):  # noqa: PTH115 - 3.8
            with contextlib.suppress(OSError):  # the end that reads
                os.write(int(entry.name), b'{"event": "made up"}\n')


def adapter_problems(folder):
    """As peft 0.11, with which the toolkit may have been installed: it knows these keys, and loads pickles as well."""
    known = (
        "base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights lora_alpha lora_dropout"
        " modules_to_save peft_type r target_modules task_type"
    )
    for key in set(json.loads((Path(folder) / "adapter_config.json").read_text())) - set(known.split()):
        yield f"__init__() got an unexpected keyword argument '{key}'"
    for path in Path(folder).glob("*.bin"):
        yield f"{path.name} was unpickled"


def merges_of(path):
    return json.loads(path.read_text())["model"]["merges"]


FAULTS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: sys.exit(3),
    "paths": name_paths,
    "raise": raise_it,
    "return": lambda: -1,
    "none": lambda: "no code",
    "false": lambda: False,
    "hang": lambda: time.sleep(1000),
    "spin": spin,
    "child": leave_child,
    "child-hang": hang_with_child,
    "chinese": chinese,
    "endless": endless_line,
    "events": forge_events,
    "ask": lambda: input("Do you wish to run the custom code? [y/N] "),
    "cuda-memory": lambda: error("Model running Error: CUDA out of memory. Tried to allocate 2.37 GiB."),
    "disk": lambda: error("Catch exception when converting model: [Errno 28] No space left on device"),
}


def fault(stage):
    """What to do wrong in a stage, or an empty text."""
    where, _, what = os.environ.get("RKLLM_STANDIN_FAULT", "").partition(":")
    return what if where == stage else ""


class Standin:
    """What the generations have in common; each api.py adds its own signatures and limits."""

    VERSION = ""
    TYPES: ClassVar[dict] = {}
    CORES: ClassVar[dict] = {}
    ALGORITHMS = ()
    OLD_TYPE_MESSAGE = False
    LIMIT = 4096

    def __init__(self):
        print(f"INFO: rkllm-toolkit version: {self.VERSION}")
        self.config = self.lora = self.built = self.folder = None

    def _load(self, model, model_lora, device, dtype="float32"):
        code = FAULTS.get(fault("load"), lambda: None)()
        if code is not None:
            return code
        if device == "cuda":
            print("WARNING: Cuda device not available! switch to cpu device!")
        try:
            config = json.loads((Path(model) / "config.json").read_text())
        except (OSError, ValueError) as reason:
            return error(f"Catch exception when loading model: {reason}")
        name = (config.get("architectures") or ["None"])[0]
        if "quantization_config" in config:
            return error("Catch exception when loading model: bitsandbytes")
        if name not in FAMILIES:
            return error(f"Not support {name}!")
        if "auto_map" in config or dtype not in ("float32", "float16", "bfloat16"):
            return -1
        shards = list(Path(model).glob("*.safetensors"))
        if not shards or not all(path.stat().st_size for path in shards):
            return error(f"Catch exception when loading model: no file named model.safetensors found in {model}")
        if model_lora is not None and not (Path(model_lora) / "adapter_config.json").is_file():
            return error(f"Catch exception when loading model: Can't find 'adapter_config.json' at '{model_lora}'")
        for problem in adapter_problems(model_lora) if model_lora is not None else ():
            return error(f"Catch exception when loading model: {problem}")
        tokenizer = Path(model) / "tokenizer.json"
        if tokenizer.is_file() and any(not isinstance(merge, str) for merge in merges_of(tokenizer)):
            return error(
                "Catch exception when loading model: data did not match any variant of untagged enum ModelWrapper"
            )
        bar("Loading checkpoint shards", len(shards), 1)
        self.config, self.lora, self.folder = config, model_lora, model
        return 0

    def _build(self, quantized, optimization_level, dtype, algorithm, platform, cores, dataset, hybrid_rate, context):
        code = FAULTS.get(fault("build"), lambda: None)()
        if code is not None:
            return code
        dtype, platform = dtype.lower(), platform.lower()
        if self.config is None or optimization_level not in (0, 1) or not 0 <= hybrid_rate < 1:
            return -1
        if quantized and dtype not in self.TYPES.get(platform, ()):
            if not self.OLD_TYPE_MESSAGE:
                return error(f"target_platform: {platform} not support quantized_dtype: {dtype}!")
            print(f"The quantized_dtype = '{dtype}' is not supported in '{platform}'!")
            return -1
        if algorithm.split("_r")[0] not in self.ALGORITHMS or not 1 <= cores <= self.CORES[platform]:
            return -1
        if context % 32 or not 0 < context <= self.LIMIT:
            return -1
        if dataset is not None and self._read_dataset(dataset):
            return -1
        if algorithm.split("_r")[0] in ("grq", "gdq"):
            Path(f"{dtype}_{platform}.qparams").write_text("scales")
        bar("Building model", 399)
        bar("Optimizing model", self.config["num_hidden_layers"])
        self.built = (quantized, dtype, context, algorithm)
        return 0

    def _read_dataset(self, path):
        if re.search(r"[\[\]*?{}]|::", path):
            raise FileNotFoundError(f"Unable to find '{path}'")  # `datasets` takes it for a pattern
        try:
            rows = json.loads(Path(path).read_text())
        except (OSError, ValueError) as reason:
            return error(f"Catch exception when loading dataset: {reason}")
        sys.stderr.write(f"Generating train split: {len(rows)} examples [00:00, 3327.05 examples/s]\n")
        if not all("input" in row for row in rows):
            return error("Catch exception when Optimizing model: 'input'")
        return 0

    def get_logits(self, inputs):
        """As in examples/test.py @ 1.1.0: input_ids [1, tokens] to logits [1, tokens, vocabulary]; None on failure."""
        code = FAULTS.get(fault("logits"), lambda: None)()
        if code is not None:
            return None
        (ids,) = inputs["input_ids"].tolist()
        count = len(ids)
        # A template around token ids.
        ids = ids + ids if fault("logits") == "doubled" else ids
        head = "embedding" if fault("logits") == "head" else "own"
        adapter = self.lora if fault("logits") == "adapter" else None
        logits = ask(self.folder, adapter, ids, head) if self.built else None
        if logits is None:
            error("Catch exception when getting logits")
            return None
        return spoiled(fault("logits"), torch.tensor([logits.tolist()[0][-count:]]))

    def _export(self, path):
        code = FAULTS.get(fault("export"), lambda: None)()
        if code is not None or self.built is None:
            return -1 if code is None else code
        quantized, dtype, context, algorithm = self.built
        hidden, width = self.config["hidden_size"], self.config["num_key_value_heads"] * self.config["head_dim"]
        group = re.search(r"_g(\d+)$", dtype)
        if quantized and width < 96:
            return error(
                f"Catch exception when converting model: dimension {width} must be greater than or equal to 96"
            )
        if quantized and group and hidden % int(group[1]):
            return error(f"Catch exception when converting model: {hidden} cannot be divided by {group[1]}")
        print(
            "WARNING: The bos token has two ids: 2 and 1, please ensure that the bos token ids in config.json and "
            "tokenizer_config.json are consistent!"
        )
        if fault("vocabulary") == "needed" and not (Path(self.folder) / "tokenizer.model").is_file():
            return error(f"Catch exception when converting model: File not found: {self.folder}/tokenizer.model")
        if fault("template") == "system":
            return error("Catch exception when converting model: System role not supported")
        said = token_ids(self.folder)
        if fault("settings") == "bos":
            said["add_bos_token"] = False
        if fault("settings") == "context":
            context = 512
        for name, value in said.items():
            print(f"INFO: Setting {name} to {value}")
        bar("Converting model", 339)
        print(f"INFO: Setting max_context_limit to {context}\nINFO: Exporting the model, please wait ....")
        if fault("write") == "suffix":  # as 1.3.0 was reported to do
            path += ".rkllm"
        if fault("write") != "nothing":
            self._write(Path(path))
        self._spoil(Path(path), fault("write"))
        beside = Path(path).with_name(f"{Path(path).stem}_lora.rkllm")
        if self.lora is not None or "_r" in algorithm or fault("lora") == "unasked":
            self._write(beside)
        self._spoil(beside, fault("lora"))
        print("[=================================================>] 597/597 (100%)")
        print(f"INFO: Model has been saved to {path}!")
        return 0

    def _spoil(self, path, how):
        if how == "nothing":
            path.unlink(missing_ok=True)
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "cut":
            path.write_bytes(b"rk")
        elif how == "closed":
            path.chmod(0)
        elif how == "two":
            self._write(path.with_name("second.rkllm"))
        elif how == "link":
            path.rename(path.with_suffix(".data"))
            path.symlink_to(path.with_suffix(".data"))
        elif how == "hard-link":
            os.link(path, path.with_suffix(".data"))

    def _write(self, path):
        magic = b"GGUF" if fault("write") == "magic" else MAGIC
        count, weights = 11 * self.config["num_hidden_layers"] + 2, bytes(self.config.get("standin_weights", 0))
        if not weights and "_lora" not in path.name:
            count, weights = body(self.folder, self.built[0], fault("head") != "dropped")
        weights = weights[: len(weights) // (2 if fault("write") == "short" else 1)] or bytes(4096)
        header = struct.pack("<IQQ", 3, count, 20)
        path.write_bytes(magic + header + weights + f"rkllm-toolkit version: {self.VERSION}".encode())
