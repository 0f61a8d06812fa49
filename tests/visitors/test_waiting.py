"""Visits that come while their agent is away for a moment."""

import contextlib
import json
import logging
import re
import socket
import threading
import time
from time import monotonic

import pytest
from hand_made import registered
from support import (
    APP,
    RAW,
    TIMEOUT,
    Origin,
    Wire,
    agent_here,
    answer,
    gateway_here,
    request,
    routes_of,
    wait_until,
)

from gotunnel import SessionClosed, read_data_header
from gotunnel_server import routes, served
from gotunnel_server.agents.tunnel import Tunnel
from gotunnel_server.routes import Registry, Route
from gotunnel_server.visitors import waiting

OTHER = "other.localhost"
WAIT = "10"  # seconds; a test that has to wait them all takes another


@pytest.fixture
def own_cache(tmp_path):
    """A gateway without a predecessor."""
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def gateway(own_cache):
    with gateway_here(own_cache, AGENT_TIMEOUT=WAIT) as gateway:
        yield gateway


@pytest.fixture
def site(origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    return origin.port


def guests(gateway):
    return len(gateway.inner._waiting._guests)


def serve_one(agent, body=b"page"):
    stream = agent.session.accept(TIMEOUT)
    assert read_data_header(stream.read_exactly)[0] == APP
    head = b""
    while b"\r\n\r\n" not in head:
        head += stream.read(timeout=TIMEOUT)
    stream.write(answer(body))


def test_visits_wait_for_an_agent_that_has_just_left(gateway, tmp_path, site):
    with agent_here(gateway, tmp_path, {APP: site}):
        kept = gateway.dial(APP)
        kept.send(request())
        assert kept.read_message()[1] == b"page"
    with kept, gateway.dial(APP) as late:
        kept.send(request())
        late.send(request())
        wait_until(lambda: guests(gateway) == 2)
        began = monotonic()
        with agent_here(gateway, tmp_path, {APP: site}):
            for visitor in (kept, late):
                assert visitor.read_message()[1] == b"page"
        assert monotonic() - began < float(WAIT)
    wait_until(lambda: not guests(gateway))


def test_a_visit_that_waits_holds_no_thread(gateway, tmp_path, site):
    with agent_here(gateway, tmp_path, {APP: site}):
        assert gateway.get(APP) == (200, b"page")
    wait_until(lambda: not routes_of(gateway.inner))
    with contextlib.ExitStack() as stack:
        before = threading.active_count()
        for number in range(20):
            stack.enter_context(gateway.dial(APP)).send(request())
            wait_until(lambda number=number: guests(gateway) == number + 1)
        assert threading.active_count() <= before + 2  # step workers are made when needed


def test_a_visit_whose_time_is_up_gets_the_usual_page(own_cache):
    with gateway_here(own_cache, AGENT_TIMEOUT="0.5") as gateway:
        with registered(gateway, APP):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        began = monotonic()
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            head, _ = visitor.read_message()
        assert head.startswith(b"HTTP/1.1 502 ") and b"X-Gotunnel-Error: no-tunnel" in head
        assert 0.5 <= monotonic() - began < TIMEOUT


@pytest.mark.parametrize("hostname", ["never.localhost", APP])
def test_who_is_not_expected_is_not_waited_for(gateway, monkeypatch, hostname):
    monkeypatch.setattr(routes, "ABSENCE", 0)
    with registered(gateway, APP):
        pass
    wait_until(lambda: not routes_of(gateway.inner))
    with gateway.dial(APP) as visitor:
        began = monotonic()
        visitor.send(request(host=hostname))
        assert visitor.read_message()[0].startswith((b"HTTP/1.1 502 ", b"HTTP/1.1 421 "))
        assert monotonic() - began < float(WAIT) / 2


def test_no_visit_waits_where_none_is_to(own_cache):
    with gateway_here(own_cache, AGENT_TIMEOUT="0") as gateway:
        with registered(gateway, APP):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        assert gateway.get(APP)[0] == 502


def test_a_visit_in_tcp_mode_waits_before_its_handshake(gateway, tmp_path):
    with Origin() as target:
        with agent_here(gateway, tmp_path, tcp={RAW: target.port}):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        results = []
        visitor = threading.Thread(target=lambda: results.append(gateway.dial(RAW)))
        visitor.start()
        wait_until(lambda: guests(gateway) == 1)
        with agent_here(gateway, tmp_path, tcp={RAW: target.port}):
            visitor.join(TIMEOUT)
            with results[0] as wire, target.accept() as served:
                served.send(b"hello")
                assert wire.read_exactly(5) == b"hello"


@pytest.mark.parametrize("first", [b"", b"SSH-2.0-x\r\n"], ids=["silent", "SSH"])
def test_a_visit_without_tls_waits_for_its_host(own_cache, tmp_path, first):
    changes = {"AGENT_TIMEOUT": WAIT, "RAW_TCP_HOST": RAW}
    with gateway_here(own_cache, **changes) as gateway, Origin() as target:
        with agent_here(gateway, tmp_path, tcp={RAW: target.port}):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        address = ("127.0.0.1", gateway.public_port)
        with Wire(socket.create_connection(address, TIMEOUT)) as visitor:
            visitor.send(first)
            wait_until(lambda: guests(gateway) == 1)
            with agent_here(gateway, tmp_path, tcp={RAW: target.port}), target.accept() as served:
                assert served.read_exactly(len(first)) == first
                served.send(b"hello")
                assert visitor.read_exactly(5) == b"hello"
                visitor.close()  # the agent would give a visit that goes on its time


def test_a_request_whose_agent_leaves_in_that_moment_is_served_by_the_next(gateway):
    with registered(gateway, APP) as agent, gateway.dial(APP) as visitor:
        (tunnel,) = gateway.inner.tunnels.registered()
        tunnel._session._mux.peer_left = True  # GO_AWAY has come, and is not acted on yet
        visitor.send(request())
        wait_until(lambda: guests(gateway) == 1)
        agent.session.close()
        with registered(gateway, APP) as successor:
            serve_one(successor)
            assert visitor.read_message()[1] == b"page"


def test_a_request_whose_route_goes_as_it_is_handed_over_waits_as_well(gateway, monkeypatch):
    with registered(gateway, APP), gateway.dial(APP) as visitor:
        exchanges = gateway.inner._visitors.exchanges
        start = exchanges.start

        def late(function):
            gateway.inner._registry.release(gateway.inner.tunnels.registered()[0])
            start(function)

        monkeypatch.setattr(exchanges, "start", late)
        visitor.send(request())
        wait_until(lambda: guests(gateway) == 1)
        monkeypatch.undo()
        with registered(gateway, APP) as successor:
            serve_one(successor)
            assert visitor.read_message()[1] == b"page"


def test_a_request_outlives_two_restarts_of_its_agent(gateway, monkeypatch):
    """The second one begins before the request has had its turn."""
    exchanges, registry = gateway.inner._visitors.exchanges, gateway.inner._registry
    start, turns = exchanges.start, []

    def late(function):
        turns.append(function)
        if len(turns) <= 2:
            registry.release(registry.lookup(APP).tunnel)
        start(function)

    monkeypatch.setattr(exchanges, "start", late)
    with registered(gateway, APP), gateway.dial(APP) as visitor:
        visitor.send(request())
        wait_until(lambda: len(turns) == 1 and guests(gateway) == 1)
        with registered(gateway, APP):
            wait_until(lambda: len(turns) == 2 and guests(gateway) == 1)
            with registered(gateway, APP) as third:
                serve_one(third)
                assert visitor.read_message()[1] == b"page"


def test_a_tunnel_that_takes_no_visit_is_tried_once_more_and_no_more(own_cache):
    with gateway_here(own_cache, AGENT_TIMEOUT="0.3") as gateway:
        with registered(gateway, APP), gateway.dial(APP) as visitor:
            (tunnel,) = gateway.inner.tunnels.registered()
            tunnel._session._mux.peer_left = True
            visitor.send(request())
            assert visitor.read_message()[0].startswith(b"HTTP/1.1 502 ")


CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "framing, before, after",
    [
        ("Content-Length: 10", b"helloworld", b""),
        ("Content-Length: 10", b"hello", b"world"),
        ("Content-Length: 10", b"", b"helloworld"),
        ("Content-Length: 0", b"", b""),
        (CHUNKED, b"a\r\nhelloworld\r\n0\r\n\r\n", b""),
        (CHUNKED, b"a\r\nhello", b"world\r\n0\r\n\r\n"),
        (CHUNKED, b"a\r\nhelloworld\r\n0\r", b"\n\r\n"),
        (CHUNKED, b"a", b"\r\nhelloworld\r\n0\r\n\r\n"),
        (CHUNKED, b"0\r\n\r\n", b""),
    ],
)
def test_a_body_that_no_agent_has_got_waits_with_its_request(
    gateway, framing, before, after, times, monkeypatch
):
    """The agent leaves when the stream is to be opened. A part of the body was read by then."""
    real, tried = Tunnel.open, []

    def late(tunnel, *arguments):
        tried.append(tunnel)
        if len(tried) <= times:
            raise SessionClosed("the agent has left")
        return real(tunnel, *arguments)

    monkeypatch.setattr(Tunnel, "open", late)
    with contextlib.ExitStack() as stack:
        for number in range(times):
            with registered(gateway, APP) as agent:
                if number == 0:
                    visitor = stack.enter_context(gateway.dial(APP))
                    visitor.send(request("POST", "/", framing) + before)
                wait_until(lambda number=number: len(tried) == number + 1 and guests(gateway) == 1)
                agent.session.close()
        with registered(gateway, APP) as successor:
            visitor.send(after + request(path="/next"))  # the next request comes early
            stream = successor.session.accept(TIMEOUT)
            read_data_header(stream.read_exactly)
            whole = b"".join(body for body in (before, after))
            end = b"" if not whole else b"0\r\n\r\n" if framing == CHUNKED else b"world"
            got = b""
            while not (b"\r\n\r\n" in got and got.endswith(end)):
                got += stream.read(timeout=TIMEOUT)
            head, _, body = got.partition(b"\r\n\r\n")
            assert head.startswith(b"POST / ") and framing.encode() in head
            assert re.sub(rb"[0-9a]+\r\n|\r\n", b"", body) == (
                b"helloworld" if b"w" in whole else b""
            )
            stream.write(answer(b"posted"))
            assert visitor.read_message()[1] == b"posted"
            serve_one(successor)
            assert visitor.read_message()[1] == b"page"


def test_a_body_of_which_an_agent_may_have_got_a_part_does_not_wait(gateway, monkeypatch):
    """The session ends while the request, which is larger than the stream's window, is sent."""
    with registered(gateway, APP) as agent, gateway.dial(APP) as visitor:
        (tunnel,) = gateway.inner.tunnels.registered()
        monkeypatch.setattr(tunnel._session._mux, "room", lambda stream_id: 0)
        visitor.send(request("POST", body=b"body"))
        wait_until(lambda: len(tunnel._session.streams_in_use()) == 2)
        agent.session.close()
        assert b"X-Gotunnel-Error: agent-gone" in visitor.read_message()[0]


def test_an_address_has_a_share_of_the_places(own_cache, monkeypatch):
    monkeypatch.setattr(waiting, "MOST_WAITING", 3)
    with gateway_here(own_cache, AGENT_TIMEOUT=WAIT) as gateway:
        with registered(gateway, APP):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        with gateway.dial(APP) as first:
            first.send(request())
            wait_until(lambda: guests(gateway) == 1)
            assert gateway.get(APP)[0] == 502


def test_a_gateway_that_stops_lets_nobody_wait(own_cache, caplog):
    with gateway_here(own_cache, AGENT_TIMEOUT=WAIT, DRAIN_TIMEOUT="5") as gateway:
        with registered(gateway, APP):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        visitor = gateway.dial(APP)
        visitor.send(request())
        wait_until(lambda: guests(gateway) == 1)
        began = monotonic()
    with visitor:
        assert visitor.read_message()[0].startswith(b"HTTP/1.1 502 ")
    assert monotonic() - began < 5
    assert "were cut" not in caplog.text


def test_many_agents_that_come_and_go_leave_nothing_behind(gateway):
    """A visitor that has left is not waited with."""
    for _ in range(3):
        with registered(gateway, APP):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            wait_until(lambda: guests(gateway) == 1)
        with registered(gateway, APP) as agent:
            wait_until(lambda: not guests(gateway))
            with contextlib.suppress(TimeoutError, SessionClosed, OSError):
                agent.session.accept(0.1).reset()
    wait_until(lambda: not gateway.inner._visitors._visitors)
    assert gateway.inner._waiting._places._taken == 0


# What the gateway before served ------------------------------------------------------------------


def test_a_gateway_expects_what_its_predecessor_served(own_cache, tmp_path, site, monkeypatch):
    monkeypatch.setattr("gotunnel_server.gateway.RELOAD", 0.1)
    path = own_cache / served.FILE
    with gateway_here(own_cache, AGENT_TIMEOUT=WAIT) as gateway:
        with agent_here(gateway, tmp_path, {APP: site}):
            wait_until(lambda: path.exists() and json.loads(path.read_text()) == {APP: "http"})
            text = path.read_text()
    path.write_text(text)  # the agent left first, which an operator's restart does not do
    with gateway_here(own_cache, AGENT_TIMEOUT=WAIT) as gateway, gateway.dial(APP) as visitor:
        visitor.send(request())
        wait_until(lambda: guests(gateway) == 1)
        with agent_here(gateway, tmp_path, {APP: site}):
            assert visitor.read_message()[1] == b"page"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "[" * 100_000, '{"\\ud800": ""}'])
def test_a_file_of_a_predecessor_that_makes_no_sense_expects_nothing(own_cache, content, caplog):
    (own_cache / served.FILE).write_text(content)
    with gateway_here(own_cache, AGENT_TIMEOUT=WAIT) as gateway:
        assert gateway.get("gateway.localhost")[0] == 200


def test_hostnames_of_the_gateway_itself_are_never_awaited():
    registry = Registry(reserved=["gw.example.com"])
    registry.expect({"gw.example.com": "http", "*.example.com": "http", "a.example.org": "tcp"})
    assert not registry.awaits("gw.example.com")
    assert registry.awaits("other.example.com") and registry.awaits("a.example.org")
    assert not registry.awaits("example.net")
    assert registry.has_left_in_tcp("a.example.org")


def test_what_is_awaited_is_bounded_and_ends_by_itself(monkeypatch):
    monkeypatch.setattr(routes, "MOST_LEFT", 3)
    registry = Registry()
    registry.expect({f"{number}.example.com": "http" for number in range(5)})
    assert list(registry.absent) == [f"{number}.example.com" for number in (2, 3, 4)]
    monkeypatch.setattr(routes, "monotonic", lambda: time.monotonic() + routes.ABSENCE)
    assert not registry.awaits("4.example.com") and not registry.absent


def test_a_claim_ends_the_waiting():
    registry = Registry()
    claims = []
    registry.on_claim = lambda: claims.append(set(registry.routes()))
    registry.expect({APP: "http"})
    registry.claim({APP: Route(APP, "http", object())})
    assert claims == [{APP}] and not registry.absent and not registry.awaits(APP)


@pytest.fixture(autouse=True)
def lines(caplog):
    caplog.set_level(logging.INFO)
