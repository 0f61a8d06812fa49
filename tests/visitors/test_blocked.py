"""Visitors whose address is blocked: they are refused at each way in, and their running visits are
cut."""

import contextlib
import socket

import pytest
from http2_by_hand import http2_visitor
from support import (
    APP,
    CUT,
    GATEWAY_HOST,
    RAW,
    TIMEOUT,
    agent_here,
    gateway_here,
    request,
    reserved_port,
    status_of,
    wait_until,
)

from gotunnel_server.net import drops
from gotunnel_server.net.blocks import Blocks, read_network
from gotunnel_server.visitors import blocked

HERE, VISITOR = "127.0.0.1", "203.0.113.9"


@pytest.fixture
def blocks():
    return Blocks()


@contextlib.contextmanager
def guarded(cache, blocks, records=None, **changes):
    """A gateway whose ports look at ``blocks``."""
    with gateway_here(cache, () if records is None else (records,), **changes) as gateway:
        inner = gateway.inner
        blocked.guard(inner._visitor_ports, blocks, inner._proxies)
        yield gateway


def block(gateway, blocks, text):
    blocks.add(read_network(text), 60, "", "")
    return sum(port.cut(blocks.__contains__) for port in gateway.inner._visitor_ports)


def test_a_blocked_visitor_gets_no_answer_and_is_counted(cache, blocks):
    with guarded(cache, blocks, HTTP_PORT="auto") as gateway:
        block(gateway, blocks, HERE)
        for port in (gateway.public_port, gateway.inner.http_port):
            with socket.create_connection((HERE, port), TIMEOUT) as visitor:
                with contextlib.suppress(ConnectionError):
                    assert visitor.recv(1) == b""
        figures = {each.name: each for each in gateway.inner.listeners.figures()}
        for name in ("gateway", "http"):
            assert figures[name].dropped[drops.BLOCKED] == 1
        wait_until(lambda: gateway.inner.listeners.taken() == 0)
        blocks.remove(read_network(HERE))
        assert gateway.get(GATEWAY_HOST)[0] == 200


def test_a_block_cuts_what_runs_and_no_agent(cache, tmp_path, origin, blocks):
    """An agent may come from the same address."""
    records = []
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with guarded(cache, blocks, records.extend) as gateway, agent_here(gateway, tmp_path, **ports):
        with gateway.dial(APP) as web, gateway.dial(RAW) as relay, gateway.dial(APP) as idle:
            web.send(request())
            relay.send(b"hello")
            with origin.accept(), origin.accept():
                assert block(gateway, blocks, HERE) == 3
                for visitor in (web, relay, idle):
                    with pytest.raises(CUT):
                        visitor.read_to_end()
        wait_until(lambda: gateway.inner.recording.settle() or len(records) == 2)
        assert {visit.error for visit in records} == {"blocked"}
        assert not any(visit.failed for visit in records)
        assert gateway.inner.tunnels.registered()
        blocks.remove(read_network(HERE))
        wait_until(lambda: not gateway.inner._visitors._visitors)


def test_a_visitor_that_a_proxy_header_names_is_blocked_and_the_proxy_is_not(cache, blocks):
    header = f"PROXY TCP4 {VISITOR} 198.51.100.7 1 443\r\n".encode()
    with guarded(cache, blocks, TRUSTED_PROXIES=HERE, HTTP_PORT="auto") as gateway:
        block(gateway, blocks, VISITOR)
        for first, answers in ((header, False), (b"", True)):
            with socket.create_connection((HERE, gateway.inner.http_port), TIMEOUT) as proxy:
                proxy.sendall(first + request(host=GATEWAY_HOST))
                with contextlib.suppress(ConnectionError):
                    assert bool(proxy.recv(1)) is answers
        figures = {each.name: each for each in gateway.inner.listeners.figures()}
        assert figures["http"].dropped == {drops.BLOCKED: 1}


def test_a_visitor_that_a_field_names_gets_a_page_and_the_connection_serves_others(cache, blocks):
    with guarded(cache, blocks, TRUSTED_PROXIES=HERE) as gateway:
        block(gateway, blocks, VISITOR)
        with gateway.dial(GATEWAY_HOST) as proxy:
            for address, status in ((VISITOR, 403), ("203.0.113.10", 200), (VISITOR, 403)):
                proxy.send(request("GET", "/", f"X-Forwarded-For: {address}", host=GATEWAY_HOST))
                head, body = proxy.read_message()
                assert status_of(head) == status
                assert (b"X-Gotunnel-Error: blocked" in head) == (status == 403)


def test_a_block_cuts_only_the_visits_of_its_visitor(cache, tmp_path, origin, blocks):
    """A proxy has a connection for each of its requests, by HTTP/1."""
    with guarded(cache, blocks, [].extend, TRUSTED_PROXIES=HERE) as gateway:
        with agent_here(gateway, tmp_path, {APP: origin.port}):
            with gateway.dial(APP) as theirs, gateway.dial(APP) as others:
                for visitor, address in ((theirs, VISITOR), (others, "203.0.113.10")):
                    visitor.send(request("GET", "/", f"X-Forwarded-For: {address}"))
                with origin.accept() as first, origin.accept() as second:
                    first.read_head()
                    second.read_head()
                    assert block(gateway, blocks, "203.0.113.8/31") == 1
                    with pytest.raises(CUT):
                        theirs.read_to_end()
                    for target in (first, second):
                        with contextlib.suppress(OSError):  # that of the visit that was cut
                            target.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                    assert status_of(others.read_head()) == 204


def test_a_block_resets_only_the_streams_of_its_visitor(cache, tmp_path, origin, blocks):
    with guarded(cache, blocks, [].extend, TRUSTED_PROXIES=HERE) as gateway:
        with agent_here(gateway, tmp_path, {APP: origin.port}), http2_visitor(gateway) as proxy:
            for stream, address in ((1, VISITOR), (3, "203.0.113.10")):
                proxy.ask(stream, ("x-forwarded-for", address))
            with origin.accept() as first, origin.accept() as second:
                first.read_head()
                second.read_head()
                assert block(gateway, blocks, VISITOR) == 1
                assert proxy.reset(1) == "CANCEL"
                for target in (first, second):
                    with contextlib.suppress(OSError):  # that of the visit that was cut
                        target.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                assert proxy.answer(3)[0] == 204


def test_without_blocks_nothing_is_looked_up(cache, blocks, monkeypatch):
    monkeypatch.setattr("gotunnel_agent.common.addresses.parse", pytest.fail)
    assert "192.0.2.1" not in blocks


def test_an_http2_connection_and_one_to_a_port_of_its_own_are_cut(cache, tmp_path, origin, blocks):
    with reserved_port() as port:
        tunnel = {
            "hostname": RAW,
            "target": f"127.0.0.1:{origin.port}",
            "mode": "tcp",
            "port": port,
        }
        with guarded(cache, blocks, TCP_PORTS=str(port)) as gateway:
            tunnels = [tunnel, {"hostname": APP, "target": f"127.0.0.1:{origin.port}"}]
            with agent_here(gateway, tmp_path, {APP: origin.port}, tunnels=tunnels):
                gateway.wait_for_routes(APP, RAW)
                with http2_visitor(gateway) as web, socket.create_connection((HERE, port)) as raw:
                    raw.settimeout(TIMEOUT)
                    web.ask(1)
                    raw.sendall(b"hello")
                    with origin.accept(), origin.accept():
                        assert block(gateway, blocks, HERE) == 2
                        for wire in (web.wire, raw):
                            read = wire.read_to_end if wire is web.wire else lambda: raw.recv(1)
                            with contextlib.suppress(*CUT, ConnectionError):
                                assert read() == b""
                with socket.create_connection((HERE, port)) as raw:
                    raw.settimeout(TIMEOUT)
                    with contextlib.suppress(ConnectionError):
                        assert raw.recv(1) == b""
