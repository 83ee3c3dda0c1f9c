"""llama.cpp as a process of the benchmark: MODEL CONTEXT NEW, prompts of ids on stdin, figures on stdout.

Run by another interpreter, so nothing of the project is imported.
"""

import json
import os
import resource
import sys
import time

import llama_cpp
from llama_cpp import llama_cpp as bare

model, context, new = sys.argv[1:]
if os.environ.get("RKEDGE_LLAMA_NO_REPACK"):
    usual = bare.llama_model_default_params

    def _without():
        params = usual()
        params.use_extra_bufts = False
        return params

    bare.llama_model_default_params = llama_cpp.llama_model_default_params = _without
llm = llama_cpp.Llama(model, n_ctx=int(context), n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
for line in sys.stdin:
    ids = json.loads(line)
    llm.reset()
    used = time.process_time()
    began = time.perf_counter()
    llm.eval(ids)
    prefilled = time.perf_counter()
    for token in range(100, 100 + int(new) - 1):
        llm.eval([token])
    ended = time.perf_counter()
    figures = {
        "prefill": len(ids) / (prefilled - began),
        "decode": (int(new) - 1) / (ended - prefilled),
        "cpu": time.process_time() - used,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures), flush=True)
