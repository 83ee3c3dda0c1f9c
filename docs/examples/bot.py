"""A conversation in a loop: `python docs/examples/bot.py BUNDLE`. Ends with an empty line."""

import sys

import rkruntime

with rkruntime.open_model(sys.argv[1]) as model:
    chat = model.chat("You answer in one short sentence.", drop_oldest=True)
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not (question := line.strip()):
            break
        for piece in chat.stream(question):
            if isinstance(piece, str):
                print(piece, end="", flush=True)
        print("\n> ", end="", flush=True)
