"""A conversation in a loop: `python docs/examples/bot.py BUNDLE`. Ends with an empty line."""

import sys

import rkruntime

SYSTEM = "You answer in one short sentence."

model = rkruntime.open_model(sys.argv[1])
try:
    chat = model.chat(SYSTEM, drop_oldest=True)
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not (question := line.strip()):
            break
        try:
            for piece in chat.stream(question):
                if isinstance(piece, str):
                    print(piece, end="", flush=True)
        except rkruntime.RKEdgeError as error:
            print(f"\n{error.message} {error.hint}", file=sys.stderr)
            if not model.engine.alive:  # the library crashed; the turns before are kept
                model.close()
                model, turns = rkruntime.open_model(sys.argv[1]), chat.conversation.as_dict()
                chat = model.chat(SYSTEM, drop_oldest=True)
                chat.conversation.restore(turns)
        print("\n> ", end="", flush=True)
finally:
    model.close()
