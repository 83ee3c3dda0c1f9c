"""Logits for the stand-in: it asks the process of the tests over a socket, and transformers computes them there.

Python 3.8 and the standard library.
"""

import json
import os
import socket

import torch


def ask(folder, adapter, ids, head):
    """Logits of a prompt, [1, tokens, vocabulary], of the model in a folder; None if no one computes any.

    head: "own", or "embedding" for a model whose head was lost.
    """
    if "RKLLM_STANDIN_ORACLE" not in os.environ:
        return None
    request = {"folder": str(folder), "adapter": adapter and str(adapter), "ids": ids, "head": head}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["RKLLM_STANDIN_ORACLE"])
        connection.sendall(json.dumps(request).encode() + b"\n")
        data = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    return torch.from_bytes(data, len(data) // 4 // len(ids))


def spoiled(how, logits):
    """The logits with a fault."""
    rows = logits.tolist()[0]
    if how == "nan":
        rows[-1][7] = float("nan")
    elif how == "infinite":
        rows[-1][7] = float("inf")
    elif how == "rows":
        rows = rows[1:]
    elif how == "narrow":
        rows = [row[: len(row) // 2] for row in rows]
    elif how == "padded":
        rows = [row + [-1e4] * 128 for row in rows]
    elif how == "flat":
        return torch.tensor(rows)
    return torch.tensor([rows])
