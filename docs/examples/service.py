"""A service of one's own on a Unix socket, a line in and a line out: `python docs/examples/service.py BUNDLE SOCKET`.

(`rkedge serve` is the whole thing: users, limits, sessions, and the interfaces of OpenAI and Ollama.)
"""

import asyncio
import contextlib
import sys

import rkruntime


async def main(bundle: str, socket: str) -> None:
    model = await asyncio.to_thread(rkruntime.open_model, bundle)
    turn = asyncio.Lock()  # a model answers one question at a time

    async def say(question: str, writer: asyncio.StreamWriter) -> None:
        nonlocal model
        async with turn:
            if not model.engine.alive:  # the library crashed over the question before
                await asyncio.to_thread(model.close)
                model = await asyncio.to_thread(rkruntime.open_model, bundle)
            async with contextlib.aclosing(model.astream(question)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, str):
                        writer.write(piece.encode())  # nobody waits here for a client that reads slowly
        writer.write(b"\n")
        await writer.drain()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for line in reader:
                if question := line.decode(errors="replace").strip():
                    await say(question, writer)
        except (rkruntime.RKEdgeError, ConnectionError, ValueError) as error:
            print(error, file=sys.stderr)
        finally:
            writer.close()

    try:
        server = await asyncio.start_unix_server(answer, socket)
        async with server:
            await server.serve_forever()
    finally:
        await asyncio.to_thread(model.close)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
