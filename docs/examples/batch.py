"""Answers to the lines of standard input, as lines of JSON: `python docs/examples/batch.py BUNDLE <questions.txt`."""

import json
import sys

import rkruntime

model = rkruntime.open_model(sys.argv[1])
try:
    for line in sys.stdin:
        if not (question := line.strip()):
            continue
        if not model.engine.alive:  # the library crashed over the question before
            model.close()
            model = rkruntime.open_model(sys.argv[1])
        try:
            answer = model.ask(question, max_new_tokens=256)
        except rkruntime.RKEdgeError as error:
            print(json.dumps({"question": question, **error.as_dict()}), flush=True)
        else:
            print(json.dumps({"question": question, "answer": answer.text, "ended": answer.reason.value}), flush=True)
finally:
    model.close()
