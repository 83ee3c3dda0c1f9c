"""Answers to the lines of standard input, as lines of JSON: `python docs/examples/batch.py BUNDLE <questions.txt`."""

import json
import sys

import rkruntime

with rkruntime.open_model(sys.argv[1]) as model:
    for line in sys.stdin:
        question = line.strip()
        try:
            answer = model.ask(question, max_new_tokens=256)
        except rkruntime.RKEdgeError as error:
            print(json.dumps({"question": question, **error.as_dict()}), flush=True)
            if not model.engine.alive:
                raise
        else:
            print(json.dumps({"question": question, "answer": answer.text, "ended": answer.reason.value}), flush=True)
