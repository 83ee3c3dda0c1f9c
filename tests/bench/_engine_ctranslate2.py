"""CTranslate2 as a process of the benchmark: SHAPE MODEL NEW, prompts of ids on stdin, figures on stdout.

SHAPE is JSON; a model of int8 weights of that shape is written to MODEL first. Its graph of Gemma 2 has neither caps
nor windows, which flatters it. Run by another interpreter, so nothing of the project is imported.
"""

import json
import resource
import sys
import time
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec


def _write(shape, folder):
    rng = np.random.default_rng(0)

    def linear(spec, rows, width):
        spec.weight = rng.integers(-127, 128, (rows, width), np.int8)
        spec.weight_scale = np.full(rows, 1 / shape["scale"], np.float32)

    def norm(spec):
        spec.gamma = np.zeros(hidden, np.float32)
        spec.layer_norm_use_residual = True

    hidden, inner, dim = shape["hidden"], shape["inner"], shape["dim"]
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape["layers"],
        shape["heads"],
        activation=common_spec.Activation.GELUTanh,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        num_heads_kv=shape["kv_heads"],
        head_dim=dim,
        pre_post_layer_norm=True,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = True
    decoder.start_from_zero_embedding = False
    linear(decoder.embeddings, shape["vocab"], hidden)
    decoder.embeddings.multiply_by_sqrt_depth = hidden**0.5
    decoder.projection.weight = decoder.embeddings.weight
    decoder.projection.weight_scale = decoder.embeddings.weight_scale
    norm(decoder.layer_norm)
    for layer in decoder.layer:
        norm(layer.input_layer_norm)
        norm(layer.post_attention_layer_norm)
        norm(layer.pre_feedforward_layer_norm)
        norm(layer.post_feedforward_layer_norm)
        linear(layer.self_attention.linear[0], (shape["heads"] + 2 * shape["kv_heads"]) * dim, hidden)
        linear(layer.self_attention.linear[1], hidden, shape["heads"] * dim)
        linear(layer.ffn.linear_0, inner, hidden)
        linear(layer.ffn.linear_0_noact, inner, hidden)
        linear(layer.ffn.linear_1, hidden, inner)
    spec.register_vocabulary([f"{i:08x}" for i in range(shape["vocab"])])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = (f"{i:08x}" for i in (2, 1, 3))
    spec.config.layer_norm_epsilon = 1e-6
    spec.validate()
    Path(folder).mkdir()
    spec.save(folder)


shape, folder, new = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
_write(shape, folder)
generator = ctranslate2.Generator(folder, compute_type="int8", intra_threads=2)
for line in sys.stdin:
    tokens = [f"{i:08x}" for i in json.loads(line)]
    times = []
    used = time.process_time()
    began = time.perf_counter()
    generator.generate_batch(
        [tokens],
        include_prompt_in_result=False,
        max_length=new,
        min_length=new,
        sampling_topk=1,
        callback=lambda step, times=times: times.append(time.perf_counter()),
    )
    step = (times[-1] - times[0]) / (len(times) - 1)
    # The prompt but its last token comes at once; the first step takes the last one.
    figures = {
        "prefill": (len(tokens) - 1) / (times[0] - began - step),
        "decode": 1 / step,
        "cpu": time.process_time() - used,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures), flush=True)
