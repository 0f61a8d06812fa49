"""Floods of silent or meaningless connections, from one address and from several, while all other
visitors are served.

The addresses are 127.0.0.1 to 127.0.0.9, which loopback takes for different peers.
"""

import contextlib
import http.client
import socket

import pytest
from hand_made import HandMade, registration
from support import (
    APP,
    RAW,
    TIMEOUT,
    TUNNEL_HOST,
    Wire,
    agent_here,
    answer,
    gateway_here,
    reserved_port,
    wait_until,
)
from tls_by_hand import PAYLOAD, HandTls

from gotunnel_agent.common import duplex as duplex_module
from gotunnel_server import capacity

HONEST = "127.0.0.9"
FLOOD = {"one": ("127.0.0.1",), "five": tuple(f"127.0.0.{n}" for n in range(1, 6))}
CONNECTIONS = 160  # at a time, on the ports that are flooded here


@pytest.fixture(params=FLOOD.values(), ids=FLOOD)
def flooders(request):
    return request.param


@pytest.fixture
def gateway(cache, monkeypatch):
    monkeypatch.setattr(capacity, "AGENT_CONNECTIONS", CONNECTIONS)
    monkeypatch.setattr(capacity, "HTTP_CONNECTIONS", CONNECTIONS)
    changes = {"MAX_CONNECTIONS": str(CONNECTIONS), "HTTP_PORT": "auto"}
    with gateway_here(cache, **changes) as gateway:
        yield gateway


@contextlib.contextmanager
def flooded(port, addresses, first=b""):
    """More connections than a port takes, from each address, all open; ``first`` is what each
    says."""
    with contextlib.ExitStack() as up:
        for address in addresses:
            for _ in range(CONNECTIONS):
                sock = socket.create_connection(("127.0.0.1", port), TIMEOUT, (address, 0))
                up.enter_context(sock)
                with contextlib.suppress(ConnectionError):  # closed at once, as most are
                    sock.sendall(first)
        yield


def visit(gateway, hostname, address=HONEST):
    sock = socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT, (address, 0))
    visitor = http.client.HTTPConnection(hostname)
    with contextlib.closing(visitor):
        visitor.sock = gateway.context.wrap_socket(sock, server_hostname=hostname)
        visitor.request("GET", "/")
        return visitor.getresponse().status


@pytest.mark.parametrize(
    "first", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01", b"PROXY TCP4 "],
    ids=["nothing", "a byte", "half a record", "a PROXY header"],
)  # fmt: skip
def test_public_port_serves_others_beside_silent_visitors(
    gateway, tmp_path, origin, flooders, first
):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"", "Connection: close"))))
    with agent_here(gateway, tmp_path, http={APP: origin.port}):
        with flooded(gateway.public_port, flooders, first):
            for _ in range(20):
                assert visit(gateway, APP) == 200


def test_visitors_that_only_shake_hands_do_not_fill_a_port(gateway, tmp_path, origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"", "Connection: close"))))
    with agent_here(gateway, tmp_path, http={APP: origin.port}), contextlib.ExitStack() as up:
        cut = 0
        for _ in range(CONNECTIONS // 4):
            try:
                up.enter_context(gateway.dial(APP))
            except OSError:
                cut += 1
        assert cut >= CONNECTIONS // 8 - 1
        assert visit(gateway, APP) == 200


def test_idle_connections_of_one_address_do_not_fill_a_port(gateway, tmp_path, origin):
    """Idle ones have been served before, so they do not count as silent."""
    origin.serve(lambda target: [target.send(answer(b"")) for _ in iter(target.read_head, b"")])
    with agent_here(gateway, tmp_path, http={APP: origin.port}), contextlib.ExitStack() as up:
        cut = 0
        for _ in range(CONNECTIONS // 2):
            try:
                visitor = up.enter_context(gateway.dial(APP))
            except OSError:
                cut += 1
                continue
            visitor.send(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % APP.encode())
            visitor.read_message()
        assert cut >= CONNECTIONS // 2 - CONNECTIONS // 3 - 1
        assert visit(gateway, APP) == 200


def test_agents_register_beside_silent_strangers(gateway, flooders):
    with flooded(gateway.tunnel_port, flooders):
        for number in range(10):
            with HandMade(gateway, registration(f"{number}.localhost"), address=HONEST) as agent:
                assert agent.hear().ok


def test_proof_is_given_beside_silent_connections(gateway, flooders):
    """The proof of an HTTP-01 validation, at HTTP_PORT."""
    port = gateway.inner.http_port
    with flooded(port, flooders):
        for _ in range(10):
            asked = http.client.HTTPConnection("127.0.0.1", port, TIMEOUT, (HONEST, 0))
            with contextlib.closing(asked):
                asked.request("GET", "/.well-known/acme-challenge/none")
                assert asked.getresponse().status == 404


@pytest.mark.parametrize("answer_asked", [False, True])
@pytest.mark.parametrize(
    ("port", "hostname", "first"),
    [
        ("public_port", APP, b""),
        ("public_port", APP, b"GET / HTTP/1.1\r\n"),
        ("public_port", RAW, b"to the target"),
        ("tunnel_port", TUNNEL_HOST, b""),
    ],
    ids=["before a request", "in a head", "in a relay", "at the agents' port"],
)
def test_connections_that_only_update_keys_end(
    gateway, tmp_path, origin, monkeypatch, port, hostname, first, answer_asked
):
    """More of them than there are step threads; none reads the answers to its key updates."""
    monkeypatch.setattr(duplex_module, "NO_PAYLOAD", 8 * 1024)
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"", "Connection: close"))))
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with agent_here(gateway, tmp_path, **ports), contextlib.ExitStack() as up:
        flooders = []
        for number in range(capacity.STEP_THREADS + 8):
            sock = socket.create_connection(
                ("127.0.0.1", getattr(gateway, port)), TIMEOUT, (f"127.0.0.{number % 8 + 1}", 0)
            )
            flooders.append(up.enter_context(HandTls(sock, hostname=hostname)))
            flooders[-1].socket.sendall(flooders[-1].record(PAYLOAD, first) if first else b"")
        while flooders:
            for flooder in list(flooders):
                try:
                    flooder.socket.sendall(
                        b"".join(flooder.key_update(answer=answer_asked) for _ in range(100))
                    )
                except ConnectionError:
                    flooders.remove(flooder)
            assert visit(gateway, APP) == 200


def test_own_ports_take_no_more_descriptors_than_visitors_may(cache, tmp_path, origin):
    """Visitors of a tunnel's own port count as visitors of the public port."""
    with reserved_port() as port, contextlib.ExitStack() as up:
        changes = {"MAX_CONNECTIONS": "8", "TCP_PORTS": str(port), "TRUSTED_PROXIES": "127.0.0.1"}
        gateway = up.enter_context(gateway_here(cache, **changes))
        up.enter_context(agent_here(gateway, tmp_path, tcp={RAW: origin.port}, tunnels=[
            {"hostname": RAW, "target": f"127.0.0.1:{origin.port}", "mode": "tcp", "port": port}
        ]))  # fmt: skip
        visitors, targets = [], []
        for _ in range(8):
            visitors.append(up.enter_context(Wire(socket.create_connection(("127.0.0.1", port)))))
            targets.append(origin.accept())
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as surplus:
            assert surplus.recv(1) == b""
        with pytest.raises(OSError):
            gateway.dial(APP)
        visitors[0].reset()
        wait_until(lambda: gateway.inner._visitor_places.taken < 8)
        with gateway.dial(RAW):
            targets.append(origin.accept())
        for target in targets:
            target.close()
