"""The floods of flood.py: many connections that cost a gateway something and bring nobody anything.

    flood_load.py KIND PORT HOSTNAME COUNT ADDRESS...    until standard input ends; prints JSON

COUNT connections are open at a time, from each ADDRESS its part, on the loopback interface alone.
One that ends is made anew, RATES a second at most.
"""

import asyncio
import collections
import contextlib
import json
import os
import socket
import ssl
import sys

HELLO_HALF = bytes.fromhex("16030102000100") + b"\x01\xfc\x03\x03" + bytes(40)
STEP = 1.0  # seconds between two bytes of a slow peer
AFTER_CUT = 0.2  # seconds until a connection that was cut is made anew
READ_SIZE = 1024  # bytes that a slow reader takes in a STEP
SMALL_BUFFER = 4096  # of its socket
NICE = 10  # real floods come from other machines: this one gives way to the programs under test
# New connections a second. A TLS handshake costs this process as much as the gateway.
RATES = {"close": 1000, "handshake": 200}
RATE = 500


class Flood:
    def __init__(self, kind, port, hostname):
        self.kind, self.port, self.hostname = kind, int(port), hostname
        self.counts = collections.Counter()
        self.gap = 1 / RATES.get(kind, RATE)
        self.next_at = 0.0
        self.trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.trust.check_hostname, self.trust.verify_mode = False, ssl.CERT_NONE

    async def turn(self):
        """Wait until the next connection may be made."""
        now = asyncio.get_running_loop().time()
        self.next_at = max(now, self.next_at + self.gap)
        await asyncio.sleep(self.next_at - now)

    async def connect(self, address, tls, buffer=0):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family)
        try:
            if buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.setblocking(False)
            sock.bind((address, 0))
            host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
            await asyncio.get_running_loop().sock_connect(sock, (host, self.port))
            self.counts["connections"] += 1
            more = {"ssl": self.trust, "server_hostname": self.hostname} if tls else {}
            return await asyncio.open_connection(sock=sock, limit=buffer or 1 << 16, **more)
        except BaseException:
            sock.close()
            raise

    async def live(self, address):
        """One connection after the other, for ever."""
        life = getattr(self, self.kind.replace("-", "_"))
        while True:
            await self.turn()
            try:
                await life(address)
            except (OSError, asyncio.IncompleteReadError, ValueError):  # it was cut
                self.counts["cut"] += 1
                await asyncio.sleep(AFTER_CUT)

    async def until_cut(self, reader):
        while piece := await reader.read(1 << 16):
            if piece.startswith(b"HTTP/1."):
                self.counts[f"status {piece[9:12].decode()}"] += 1
        raise ConnectionError

    # The kinds

    async def silent(self, address):
        reader, writer = await self.connect(address, tls=False)
        with contextlib.closing(writer):
            await self.until_cut(reader)

    async def close(self, address):
        _, writer = await self.connect(address, tls=False)
        writer.close()

    async def half_hello(self, address):
        reader, writer = await self.connect(address, tls=False)
        with contextlib.closing(writer):
            writer.write(HELLO_HALF)
            await self.until_cut(reader)

    async def handshake(self, address):
        _, writer = await self.connect(address, tls=True)
        self.counts["handshakes"] += 1
        writer.close()

    async def slow_request(self, address):
        await self._slowly(address, b"GET /small HTTP/1.1\r\n", b"X-A: %d\r\n")

    async def slow_body(self, address):
        head = f"POST /small HTTP/1.1\r\nHost: {self.hostname}\r\nContent-Length: 1000000\r\n\r\n"
        await self._slowly(address, head.encode(), b"x")

    async def _slowly(self, address, first, piece):
        reader, writer = await self.connect(address, tls=True)
        with contextlib.closing(writer):
            writer.write(first)
            gone = asyncio.ensure_future(self.until_cut(reader))
            try:
                while not gone.done():
                    writer.write(piece % 1 if b"%" in piece else piece)
                    await asyncio.wait([gone], timeout=STEP)
                await gone
            finally:
                gone.cancel()

    async def slow_reader(self, address):
        reader, writer = await self.connect(address, tls=True, buffer=SMALL_BUFFER)
        with contextlib.closing(writer):
            writer.write(f"GET /large HTTP/1.1\r\nHost: {self.hostname}\r\n\r\n".encode())
            first = await reader.read(READ_SIZE)
            self.counts[f"status {first[9:12].decode()}"] += 1
            while await reader.read(READ_SIZE):
                await asyncio.sleep(STEP)
            raise ConnectionError

    async def silent_target(self, address):
        reader, writer = await self.connect(address, tls=True)
        with contextlib.closing(writer):
            writer.write(f"GET / HTTP/1.1\r\nHost: {self.hostname}\r\n\r\n".encode())
            await self.until_cut(reader)


async def flood(kind, port, hostname, count, addresses):
    made = Flood(kind, port, hostname)
    lives = [
        asyncio.ensure_future(made.live(addresses[number % len(addresses)]))
        for number in range(count)
    ]
    await asyncio.to_thread(sys.stdin.read)
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)
    print(json.dumps(made.counts), flush=True)


def main(kind, port, hostname, count, *addresses):
    os.nice(NICE)
    asyncio.run(flood(kind, port, hostname, int(count), addresses))


if __name__ == "__main__":
    main(*sys.argv[1:])
