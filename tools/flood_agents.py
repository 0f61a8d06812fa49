"""Many agents of flood.py in one process: each is registered, and comes back at once if it is cut.

    flood_agents.py PORT HOSTNAME SECRET COUNT     until standard input ends

HOSTNAME is the gateway's name (SNI). They speak like Go agents: no features, one hostname each, and
pongs. Prints, whenever it has changed, how many are registered, and how often one was so far.
"""

import asyncio
import contextlib
import json
import ssl
import sys
import time

import jwt

from gotunnel import MessageReader, Mux, Ping, Pong, ProtocolError, Received, encode_message

LOOPBACK = "127.0.0.1"
LIFETIME = 3600  # seconds of a token, as the Go agent's
RETRY = 2  # seconds after a dial that brought no session, as the Go agent's
PULL = 1 << 20
SAY_EVERY = 0.1  # seconds


class Agents:
    def __init__(self, port, hostname, secret):
        self._port, self._hostname, self._secret = int(port), hostname, secret
        self._trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._trust.check_hostname, self._trust.verify_mode = False, ssl.CERT_NONE
        self.registered = self.registrations = 0

    def _registration(self, number):
        now = int(time.time())
        claims = {"iss": f"flood{number}", "iat": now, "exp": now + LIFETIME}
        return json.dumps({
            "type": "register", "token": jwt.encode(claims, self._secret, algorithm="HS256"),
            "routes": {f"flood{number}.localhost": f"{LOOPBACK}:9"},
        }).encode() + b"\n"  # fmt: skip

    async def live(self, number):
        """One session after the other, for ever."""
        while True:
            served = False
            with contextlib.suppress(OSError, ProtocolError, asyncio.IncompleteReadError):
                served = await self._session(number)
            if not served:
                await asyncio.sleep(RETRY)

    async def _session(self, number):
        """Whether the gateway has served it."""
        reader, writer = await asyncio.open_connection(
            LOOPBACK, self._port, ssl=self._trust, server_hostname=self._hostname
        )
        served = False
        try:
            mux, messages = Mux(client=True), MessageReader()
            control = mux.open(time.monotonic())
            mux.send(control, self._registration(number))
            while True:
                writer.write(mux.pull(PULL)[0])
                data = await reader.read(PULL)
                if not data:
                    return served
                for event in mux.receive(data, time.monotonic()):
                    if not isinstance(event, Received):
                        continue
                    mux.consumed(event.stream_id, len(event.payload), time.monotonic())
                    for message in messages.feed(event.payload):
                        if isinstance(message, Ping):
                            mux.send(control, encode_message(Pong(time.time() * 1000)))
                        elif not served:  # the ack
                            if not message.ok:
                                return False
                            served = True
                            self.registered += 1
                            self.registrations += 1
        finally:
            self.registered -= served
            writer.close()

    async def say(self):
        said = None
        while True:
            if (self.registered, self.registrations) != said:
                said = self.registered, self.registrations
                print(*said, flush=True)
            await asyncio.sleep(SAY_EVERY)


async def run(port, hostname, secret, count):
    agents = Agents(port, hostname, secret)
    tasks = [asyncio.ensure_future(agents.live(number)) for number in range(count)]
    tasks.append(asyncio.ensure_future(agents.say()))
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()


def main(port, hostname, secret, count):
    asyncio.run(run(port, hostname, secret, int(count)))


if __name__ == "__main__":
    main(*sys.argv[1:])
