"""A worker that is none: reads commands, and answers each with the bytes of a script. Its last argument names that.

The script is JSON: a list of answers, one per command, the load's first; an answer is a list of steps. A step is hex
digits to write (NNNN stands for the command's number), "exit", "fork" (a child goes on for ever with the step that
follows, and the worker ends), "repeat" (the next step, without end), or "wait".
"""

import json
import os
import struct
import sys
import time
from pathlib import Path


def read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


def write(fd: int, step: str, number: int) -> None:
    view = memoryview(bytes.fromhex(step.replace("NNNN", struct.pack("<H", number & 0xFFFF).hex())))
    while view:
        view = view[os.write(fd, view) :]


def main() -> None:
    commands, records = map(int, sys.argv[-2:])
    for answer in json.loads(Path(os.environ["FAKE_WORKER"]).read_text()):
        header_size, data_size = struct.unpack("<II", read(commands, 8))
        header = json.loads(read(commands, header_size))
        read(commands, data_size)
        steps = iter(answer)
        for step in steps:
            if step == "exit":
                os._exit(3)
            elif step == "wait":
                time.sleep(3600)
            elif step in ("fork", "repeat"):
                if step == "fork" and os.fork():
                    os._exit(3)
                following = next(steps)
                while True:
                    write(records, following, header["run"])
            else:
                write(records, step, header["run"])
    while True:  # whatever else is asked
        read(commands, 1)


main()
