"""The emulator as a process of the benchmark: LIBRARY MODEL CONTEXT NEW, prompts of ids on stdin, figures on stdout."""

import json
import sys
import time
from pathlib import Path

from tests.emulator.client import Client

library, model, context, new = sys.argv[1:]
params = {"max_context_len": int(context), "max_new_tokens": int(new), "enabled_cpus_num": 4}
client = Client(Path(library), Path(model), "1.2.3", 1, params, None, None)
assert client.status == 0
for line in sys.stdin:
    client.clear()
    began = time.process_time()
    assert client.run(json.loads(line)) == 0
    perf = client.last.perf
    figures = {
        "prefill": perf.prefill_tokens / perf.prefill_time_ms * 1000,
        "decode": (perf.generate_tokens - 1) / perf.generate_time_ms * 1000,
        "cpu": time.process_time() - began,
        "peak": perf.memory_usage_mb,
    }
    print(json.dumps(figures), flush=True)
