"""A visitor of the bench, or many idle ones, as a process of its own. Prints JSON.

    bench_visitor.py download PORT HOSTNAME SECONDS   loads /large over and over: bytes and seconds
    bench_visitor.py small PORT HOSTNAME SECONDS      asks for /small now and then: a list of ms
    bench_visitor.py idle PORT HOSTNAME COUNT         one request each on COUNT connections, which
                                                      stay open until standard input ends

Certificates are not verified: wrk does not either, and who answers is known.
"""

import json
import socket
import ssl
import sys
import time

LOOPBACK = "127.0.0.1"
TIMEOUT = 30  # seconds for any one wait
PIECE = 256 * 1024  # bytes of a read, at most; TLS gives a record of 16 KiB
PAUSE = 0.005  # seconds between two small requests: latency is wanted, not load


class Visitor:
    """A connection to HOSTNAME that is kept for all its requests."""

    def __init__(self, port, hostname):
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        plain = socket.create_connection((LOOPBACK, port), TIMEOUT)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = trust.wrap_socket(plain, server_hostname=hostname)
        self._host = f"{hostname}:{port}"
        self._buffer = memoryview(bytearray(PIECE))

    def get(self, path, until=float("inf")):
        """Ask for ``path`` and read the answer, at most until that monotonic time. Return the bytes
        of its body that came."""
        self._sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self._sock.recv(PIECE)
            if not piece:
                sys.exit(f"the answer ended in its head: {data!r}")
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        status, *fields = head.decode("latin-1").lower().split("\r\n")
        if status.split()[1] != "200":
            sys.exit(f"{path} was answered with {status!r}, expected 200")
        length = next(int(field[15:]) for field in fields if field.startswith("content-length:"))
        came = len(body)
        while came < length and time.monotonic() < until:
            more = self._sock.recv_into(self._buffer)
            if not more:
                sys.exit(f"{path} ended after {came} of {length} bytes")
            came += more
        return came


def download(port, hostname, seconds):
    visitor = Visitor(port, hostname)
    began, came = time.monotonic(), 0
    until = began + seconds
    while time.monotonic() < until:
        came += visitor.get("/large", until)
    return {"bytes": came, "seconds": time.monotonic() - began}


def small(port, hostname, seconds):
    visitor, took = Visitor(port, hostname), []
    until = time.monotonic() + seconds
    while time.monotonic() < until or not took:
        began = time.monotonic()
        visitor.get("/small")
        took.append((time.monotonic() - began) * 1000)
        time.sleep(PAUSE)
    return took


def idle(port, hostname, count):
    visitors = [Visitor(port, hostname) for _ in range(int(count))]
    for visitor in visitors:
        visitor.get("/small")
    print(json.dumps(len(visitors)), flush=True)
    sys.stdin.read()


def main(kind, port, hostname, amount):
    result = {"download": download, "small": small, "idle": idle}[kind](
        int(port), hostname, float(amount)
    )
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
