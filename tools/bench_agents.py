"""Many idle agents of the bench in one process: each is registered, and that is all.

    bench_agents.py PORT HOSTNAME SECRET COUNT    prints COUNT when all are registered, and holds
                                                  them until standard input ends

HOSTNAME is the gateway's name (SNI). They speak like a Go agent: no features, one hostname each.
bench.py starts this with the repository on PYTHONPATH.
"""

import json
import socket
import ssl
import sys
import time

import jwt

from gotunnel import DATA, HEADER_SIZE, SYN, WINDOW_UPDATE, Header

LOOPBACK = "127.0.0.1"
TIMEOUT = 30  # seconds for any one wait
LIFETIME = 3600  # seconds of a token, as the Go agent's
CONTROL_STREAM = 1


def register(number, port, hostname, secret):
    """Dial and register one agent; return its connection."""
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection((LOOPBACK, port), TIMEOUT)
    sock = trust.wrap_socket(plain, server_hostname=hostname)
    now = int(time.time())
    claims = {"iss": f"idle{number}", "iat": now, "exp": now + LIFETIME}
    message = {
        "type": "register",
        "token": jwt.encode(claims, secret, algorithm="HS256"),
        "routes": {f"idle{number}.localhost": f"{LOOPBACK}:9"},
    }
    payload = json.dumps(message).encode() + b"\n"
    opened = Header(WINDOW_UPDATE, SYN, CONTROL_STREAM, 0).encode()
    sock.sendall(opened + Header(DATA, 0, CONTROL_STREAM, len(payload)).encode() + payload)
    answer = b""
    while b'"ok"' not in answer or not answer.endswith(b"\n"):
        piece = sock.recv(HEADER_SIZE + 64 * 1024)
        if not piece:
            sys.exit(f"agent {number}: no answer but {answer!r}")
        answer += piece
    if b'"ok":true' not in answer.replace(b" ", b""):
        sys.exit(f"agent {number} was refused: {answer!r}")
    return sock


def main(port, hostname, secret, count):
    agents = [register(number, int(port), hostname, secret) for number in range(int(count))]
    print(len(agents), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
