"""An agent whose inspector is attacked by programs of this machine: its tunnel goes on, and its
memory, descriptors and threads stay within bounds."""

import contextlib
import http.client
import os
import random
import socket
import sys
import threading
from pathlib import Path

import pytest
from support import (
    APP,
    ROOT,
    TIMEOUT,
    Origin,
    agent_process,
    answer,
    dial_tls,
    gateway_here,
    request,
    reserved_port,
    wait_until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc"),
]

MIB = 1024 * 1024


class Attacked:
    """The inspector of a running agent."""

    def __init__(self, port, token, pid):
        self.port, self.token, self._proc = port, token, Path(f"/proc/{pid}")

    def dial(self):
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT)

    def ask(self, path="info", method="GET", body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            fields = {"Authorization": f"Bearer {self.token}"}
            connection.request(method, f"/api/v1/{path}", body, fields)
            found = connection.getresponse()
            found.read()
            return found.status

    def memory(self):
        """Bytes in memory."""
        return int((self._proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self):
        return len(os.listdir(self._proc / "fd"))


def slow_heads(attacked):
    with contextlib.ExitStack() as opened:
        socks = [opened.enter_context(attacked.dial()) for _ in range(1000)]
        for piece in (b"GET / HTTP/1.1\r\n", b"X: ", b"a", b"a"):
            for sock in socks:
                with contextlib.suppress(OSError):  # closed, as one of the oldest
                    sock.sendall(piece)
        assert attacked.ask() == 200
        assert attacked.descriptors() < 300


def garbage(attacked):
    draw = random.Random(1)
    for _ in range(500):
        with attacked.dial() as sock, contextlib.suppress(OSError):
            sock.sendall(draw.randbytes(draw.randrange(1, 70_000)))


def pipelining(attacked):
    one = (
        f"GET /api/v1/visits HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {attacked.token}\r\n\r\n"
    )
    for _ in range(50):
        with attacked.dial() as sock, contextlib.suppress(OSError):
            sock.sendall(one.encode() * 2000)


def uploads(attacked):
    head = (
        "POST /api/v1/har HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {attacked.token}\r\nContent-Length: 33000000\r\n\r\n"
    )
    with contextlib.ExitStack() as opened:
        socks = [opened.enter_context(attacked.dial()) for _ in range(12)]
        for sock in socks:
            with contextlib.suppress(OSError):  # refused: another one is being read
                sock.sendall(head.encode() + b"[" * 20 * MIB)
        assert attacked.ask() == 200


def archives(attacked):
    for body in (
        b'{"log":{"entries":[' + b"[]," * 8_000_000 + b"[]]}}",
        b'{"log":' + b"[" * 30_000_000,
        b'{"log":{"entries":["' + b"\\u0000" * 5_000_000 + b'"]}}',
    ):
        wait_until(lambda body=body: attacked.ask("har", "POST", body) == 400)


def silent_readers(attacked):
    head = (
        f"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {attacked.token}"
    )
    with contextlib.ExitStack() as opened:
        for _ in range(20):
            opened.enter_context(attacked.dial()).sendall(f"{head}\r\n\r\n".encode())
        assert attacked.ask("visits?q=nothing") == 200


@pytest.fixture
def world(tmp_path):
    """A gateway, and an inspector to attack, whose agent serves meanwhile."""
    folder, state = tmp_path, tmp_path / "state"
    command = ("env", f"XDG_STATE_HOME={state}", sys.executable, str(ROOT / "gotunnel_agent"))
    (folder / "cache").mkdir()
    with contextlib.ExitStack() as opened:
        gateway = opened.enter_context(gateway_here(folder / "cache"))
        origin = opened.enter_context(Origin())
        port = opened.enter_context(reserved_port())
        origin.serve(serve)
        agent = opened.enter_context(
            agent_process(gateway, folder, {APP: origin.port}, command=command, inspect=str(port))
        )
        [file] = state.rglob("*.token")
        yield gateway, Attacked(port, file.read_text().strip(), agent.pid)


def serve(wire):
    while True:
        wire.read_message()
        wire.send(answer(b"x" * 1000))


@pytest.mark.parametrize(
    "attack", [slow_heads, garbage, pipelining, uploads, archives, silent_readers]
)
def test_the_tunnel_goes_on(world, attack):
    gateway, attacked = world
    over, served = threading.Event(), []

    def visit():
        with dial_tls(gateway.public_port, APP, gateway.context) as wire:
            while not over.is_set():
                wire.send(request())
                served.append(wire.read_message()[0][:12])

    memory, descriptors = attacked.memory(), attacked.descriptors()
    visits = threading.Thread(target=visit)
    visits.start()
    try:
        wait_until(lambda: served)
        attack(attacked)
        before = len(served)
        wait_until(lambda: len(served) > before)
    finally:
        over.set()
        visits.join(TIMEOUT)
    assert set(served) == {b"HTTP/1.1 200"}
    assert attacked.memory() - memory < 200 * MIB
    wait_until(lambda: attacked.descriptors() <= descriptors + 5, timeout=60)
