"""A connection that is closed leaves nothing in memory, although Python has not looked for
reference cycles: a flood's connections would stay, each with 60 kB of TLS, until it does."""

import contextlib
import gc
import logging
import weakref

import pytest
from support import (
    APP,
    RAW,
    agent_here,
    agent_process,
    answer,
    gateway_here,
    request,
    reserved_port,
    wait_until,
)

from gotunnel_server.visitors import visitor as visitor_module

LARGE = 2_000_000
OFF = "off.localhost"


@pytest.fixture
def no_collection():
    """Without the collector, and without log records that pytest keeps: they hold visitors."""
    log = logging.getLogger("gotunnel")
    level = log.level
    log.setLevel(logging.CRITICAL)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    log.setLevel(level)


def serve(target):
    for head in iter(target.read_head, b""):
        if b"pgrade" in head:
            target.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
                        b"Upgrade: raw\r\n\r\n")  # fmt: skip
            return
        if b"/body" in head:
            target.read_exactly(5)
        target.send(answer(bytes(LARGE if b"/large" in head else 5)))


def test_closed_connections_are_freed_at_once(cache, tmp_path, origin, monkeypatch, no_collection):
    made = []
    init = visitor_module.Visitor.__init__

    def note(self, *arguments):
        init(self, *arguments)
        made.append(weakref.ref(self.duplex))

    monkeypatch.setattr(visitor_module.Visitor, "__init__", note)
    origin.serve(serve)
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with gateway_here(cache, ACCESS_LOG="/dev/null") as gateway, reserved_port() as nobody:
        ports["http"][OFF] = nobody
        with agent_process(gateway, tmp_path, **ports):

            def visit(said, hostname=APP, expected=b"HTTP/1.1 ", reset=False):
                with gateway.dial(hostname) as visitor:
                    visitor.send(said)
                    assert visitor.read_exactly(len(expected)) == expected
                    if reset:
                        visitor.reset()

            kinds = {
                "served": lambda: visit(request()),
                "with a body": lambda: visit(request("POST", "/body", body=b"12345")),
                "cut": lambda: visit(request("GET", "/large"), reset=True),
                "malformed": lambda: visit(b"nonsense\r\n\r\n"),
                "no target": lambda: visit(request(host=OFF), OFF),
                "no such hostname": lambda: visit(request(host="else.localhost")),
                "upgraded": lambda: visit(
                    request("GET", "/", "Connection: Upgrade", "Upgrade: raw")
                ),
                "tcp": lambda: visit(request(host="x"), RAW),
                "says nothing": lambda: visit(b"", expected=b""),
            }
            for kind, once in kinds.items():
                for _ in range(3):
                    with contextlib.suppress(ConnectionError):
                        once()
                assert made, kind
                wait_until(lambda: not [ref for ref in made if ref() is not None])
                made.clear()


@pytest.mark.parametrize("away", [1, 2])
def test_so_are_those_of_a_pool(cache, tmp_path, origin, monkeypatch, no_collection, away):
    """``away``: the number of its two agents whose targets are not there."""
    made = []
    init = visitor_module.Visitor.__init__

    def note(self, *arguments):
        init(self, *arguments)
        made.append(weakref.ref(self.duplex))

    monkeypatch.setattr(visitor_module.Visitor, "__init__", note)
    origin.serve(serve)
    with (
        gateway_here(cache, ACCESS_LOG="/dev/null") as gateway,
        reserved_port() as nobody,
        contextlib.ExitStack() as agents,
    ):
        for number in range(2):
            place = {"target": f"127.0.0.1:{nobody if number < away else origin.port}"}
            tunnels = [
                {"hostname": APP, "pool": "true", **place},
                {"hostname": RAW, "pool": "true", "mode": "tcp", **place},
            ]
            folder = tmp_path / str(number)
            folder.mkdir()
            agents.enter_context(agent_here(gateway, folder, ready=False, tunnels=tunnels))
        wait_until(lambda: len(gateway.inner.tunnels.registered()) == 2)
        for said in (request(), request("POST", "/body", body=b"12345")):
            for _ in range(3):
                with gateway.dial(APP) as visitor:
                    visitor.send(said)
                    visitor.read_message()
        for _ in range(3):
            with gateway.dial(RAW) as visitor, contextlib.suppress(OSError):
                visitor.send(request(host="x"))
                visitor.read_message()
        assert len(made) == 9
        wait_until(lambda: not [ref for ref in made if ref() is not None])
