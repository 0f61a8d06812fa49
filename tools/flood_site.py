"""The target of flood.py: small pages, large ones, bodies that are read; and a silent port.

    flood_site.py      prints two ports, then serves until standard input ends

The first port speaks HTTP/1.1: GET /small, GET /large, and POST of any body. The second one accepts
connections and never says a word.
"""

import asyncio
import socket
import sys

LOOPBACK = "127.0.0.1"
SMALL, LARGE = 1024, 8 << 20  # bytes of the answers
PIECE = 64 * 1024
BACKLOG = 1024
# By itself the kernel takes 4 MB of an answer at once. Meanwhile this one loop serves nobody else:
# beside hundreds of slow readers a small page took up to 0.8 s here, and was counted as the
# gateway's. And all that is written takes the kernel's memory for TCP, which on a machine of its
# own a target would not share with a gateway.
SEND_BUFFER = 128 * 1024


async def answer(reader, writer):
    """Serve one connection, request by request."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            line, *fields = head.decode("latin-1").split("\r\n")
            left = next((int(f.partition(":")[2]) for f in fields
                         if f.lower().startswith("content-length:")), 0)  # fmt: skip
            while left:
                piece = await reader.read(min(left, PIECE))
                if not piece:
                    return
                left -= len(piece)
            size = LARGE if line.split()[1] == "/large" else SMALL
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            while size:
                writer.write(bytes(min(size, PIECE)))
                size -= min(size, PIECE)
                await writer.drain()
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # the agent has closed it
    finally:
        writer.close()


async def say_nothing(reader, writer):
    try:
        while await reader.read(PIECE):
            pass
    except OSError:
        pass
    finally:
        writer.close()


async def main():
    servers = [
        await asyncio.start_server(serve, LOOPBACK, 0, backlog=BACKLOG)
        for serve in (answer, say_nothing)
    ]
    for server in servers:  # what it accepts inherits the option
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
