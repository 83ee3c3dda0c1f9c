"""A service of one's own on a Unix socket, a line in and a line out: `python docs/examples/service.py BUNDLE SOCKET`.

(`rkedge serve` is the whole thing: users, limits, sessions, and the interfaces of OpenAI and Ollama.)
"""

import asyncio
import sys

import rkruntime


async def main(bundle: str, socket: str) -> None:
    model = await asyncio.to_thread(rkruntime.open_model, bundle)
    turn = asyncio.Lock()  # a model answers one question at a time

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for line in reader:
                async with turn:
                    async for piece in model.astream(line.decode(errors="replace").strip()):
                        if isinstance(piece, str):
                            writer.write(piece.encode())
                            await writer.drain()
                writer.write(b"\n")
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
