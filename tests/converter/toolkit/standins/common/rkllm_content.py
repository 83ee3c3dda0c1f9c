"""What the stand-in puts into a file: the tensors of the model's folder, and what its tokenizer's files say.

Python 3.8 and the standard library.
"""

import json
import struct
from pathlib import Path

SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def tensors(folder):
    """Format and bytes of each tensor in a folder's safetensors, by name."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], data[8 + length + first : 8 + length + last])
    return found


def packed(dtype, data, quantized):
    """A tensor of a file: the upper byte of each weight, or two if nothing is quantized."""
    size = SIZES[dtype]
    upper = data[size - 1 :: size]
    return upper if quantized else upper + data[size - 2 :: size]


def body(folder, quantized, keep_head):
    """Number of the file's tensors, and their bytes: the embedding in 16 bits, and the head, which may be the same."""
    found = tensors(folder)
    head = found.pop("lm_head.weight", None)
    if head is None or not keep_head:
        head = found["model.embed_tokens.weight"]
    parts = [packed(*value, quantized and "embed" not in name) for name, value in sorted(found.items())]
    return len(parts) + 1, b"".join([*parts, packed(*head, quantized)])


def token_ids(folder):
    """Ids of the special tokens, and what is added to texts, as the tokenizer's files say; none if there are none."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return {}
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(name + "_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            found["token_id of " + name] = ids[token]
    for name in ("add_bos_token", "add_eos_token"):
        found[name] = config.get(name, False)
    return found
