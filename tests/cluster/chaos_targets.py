"""The targets of the chaos bench, in a process of their own.

    chaos_targets.py AGENT...    prints a port for each agent, and serves until standard input ends

A target answers GET /VISIT/SIZE with content(), and names its agent in X-Agent.
/VISIT/SIZE/SECONDS has the second half come so much later.
"""

import hashlib
import socket
import sys
import threading
import time


def content(hostname, visit, size) -> bytes:
    """What the target of a hostname answers to a visit: bytes that no other visit gets."""
    return hashlib.shake_128(f"{hostname} {visit}".encode()).digest(size)


def main(agents):
    for agent in agents:
        listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        print(listening.getsockname()[1], flush=True)
        threading.Thread(target=accept, args=(listening, agent), daemon=True).start()
    sys.stdin.read()


def accept(listening, agent):
    while True:
        sock, _ = listening.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(sock, agent), daemon=True).start()


def serve(sock, agent):
    with sock, sock.makefile("rb") as requests:
        try:
            while line := requests.readline():
                hostname = ""
                while (field := requests.readline()) not in (b"\r\n", b""):
                    name, _, value = field.partition(b":")
                    if name.lower() == b"host":
                        hostname = value.strip().decode().partition(":")[0]
                answer(sock, agent, hostname, line.split()[1].decode())
        except OSError:
            pass  # the agent has ended the connection


def answer(sock, agent, hostname, path):
    _, visit, size, *pause = path.split("/")
    body = content(hostname, visit, int(size))
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nX-Agent: {agent}\r\n\r\n".encode()
    half = len(body) // 2 if pause else len(body)
    sock.sendall(head + body[:half])
    if pause:
        time.sleep(float(pause[0]))
        sock.sendall(body[half:])


if __name__ == "__main__":
    main(sys.argv[1:])
