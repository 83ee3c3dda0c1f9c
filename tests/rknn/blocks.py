"""Run by the Python that has rknn-toolkit2: build blocks of a model, and compute them in the vendor's simulator.

Takes a JSON list of jobs on standard input and prints a line of JSON for each: what refused it and in which words, or
that it was built. Knows nothing of RKEdge.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CAP = 30.0
EPSILON = 1e-6


class Graph:
    """An ONNX graph of primitives: the tool's own patterns find what it fuses."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self.weights, self.nodes, self.constants = weights, [], []

    def constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [f"t{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def times(self, values: str, name: str) -> str:
        return self.node("MatMul", values, self.constant(self.weights[name].T))

    def scaled(self, values: str, factor: float) -> str:
        return self.node("Mul", values, self.constant([factor]))

    def matrix(self, x: str) -> str:
        return self.times(x, "w")

    def norm(self, x: str) -> str:
        mean = self.node("ReduceMean", self.node("Mul", x, x), axes=[-1], keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.constant([EPSILON])))
        return self.node("Mul", self.node("Div", x, root), self.constant(1 + self.weights["w"]))

    def gelu(self, x: str) -> str:
        cube = self.node("Mul", self.node("Mul", x, x), x)
        inner = self.scaled(self.node("Add", x, self.scaled(cube, 0.044715)), (2 / np.pi) ** 0.5)
        return self.node("Mul", self.scaled(x, 0.5), self.node("Add", self.node("Tanh", inner), self.constant([1.0])))

    def mlp(self, x: str) -> str:
        return self.times(self.node("Mul", self.gelu(self.times(x, "gate")), self.times(x, "up")), "down")

    def softcap(self, x: str) -> str:
        return self.scaled(self.node("Tanh", self.scaled(x, 1 / CAP)), CAP)

    def head(self, x: str) -> str:
        return self.softcap(self.matrix(x))

    def model(self, kind: str, rows: int, width: int, outputs: int) -> Any:
        from onnx import TensorProto, helper

        getattr(self, kind)("x")
        self.nodes[-1].output[0] = "y"
        shapes = {"x": [1, rows, width], "y": [1, rows, outputs]}
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
        graph = helper.make_graph(self.nodes, kind, [x], [y], self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        made.ir_version = 8
        return made


def main() -> None:
    from rknn.api import RKNN

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the tool prints there
    for job in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"job": job, **simulated(RKNN(verbose=False), job, folder)}), file=answers, flush=True)


def simulated(rknn: Any, job: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Go through the tool's steps; the result is saved where the job says."""
    import onnx

    weights = dict(np.load(job["file"]))
    samples = weights.pop("samples")
    onnx.save(Graph(weights).model(job["kind"], *samples.shape[1:], job["outputs"]), f"{folder}/block.onnx")
    for number, sample in enumerate(samples):
        np.save(f"{folder}/{number}.npy", sample[None])
    with Path(folder, "samples.txt").open("w") as file:
        file.writelines(f"{folder}/{number}.npy\n" for number in range(len(samples)))
    plain = job["type"] == "fp16"
    steps: dict[str, Callable[[], Any]] = {
        "config": lambda: rknn.config(
            target_platform=job["platform"], **({} if plain else {"quantized_dtype": job["type"]})
        ),
        "load_onnx": lambda: rknn.load_onnx(f"{folder}/block.onnx"),
        "build": lambda: rknn.build(do_quantization=not plain, dataset=f"{folder}/samples.txt"),
        "init_runtime": rknn.init_runtime,
    }
    for name, step in steps.items():
        try:
            code = step()
        except Exception as error:
            return {"refused_by": name, "words": str(error).strip().splitlines()[-1]}
        if code not in (0, None):
            return {"refused_by": name, "words": f"returned {code}"}
    found = [rknn.inference(inputs=[sample[None]], data_format=["nchw"])[0][0] for sample in samples[: job["compared"]]]
    np.save(job["result"], np.stack(found))
    rknn.release()
    return {}


if __name__ == "__main__":
    main()
