"""Visits that come to one gateway, and whose agent is at another one."""

import contextlib
import hashlib
import threading
from importlib import import_module

import pytest
from peers_here import peers_here
from raw_peer import noise
from support import (
    APP,
    CUT,
    MIB,
    RAW,
    agent_here,
    answer,
    fields_of,
    go_agent,
    request,
    status_of,
    wait_until,
)

from gotunnel_agent.common.passwords import hash_password
from gotunnel_server.cluster.peer_tunnel import PeerTunnel

WEBSOCKET = ("Connection: Upgrade", "Upgrade: chat")


def threads():
    """All but the timer of pytest-timeout."""
    return {each for each in threading.enumerate() if not isinstance(each, threading.Timer)}


@pytest.fixture(scope="module")
def two(cache):
    """``here`` takes the visits, ``there`` has the agents."""
    before = threads()
    with peers_here(cache) as members:
        yield members
    wait_until(lambda: threads() <= before)


@pytest.fixture(autouse=True)
def no_thread_left():
    """The gateways are those of all tests here, and start threads when they need them."""


@contextlib.contextmanager
def agent_there(two, folder, http={}, tcp={}, **keys):
    here, there = two
    with agent_here(there.gateway, folder, http, tcp, **keys) as agent:
        here.sees(*http, *tcp)
        yield agent
    here.sees_no(*http, *tcp)


def test_kept_streams_serve_many_requests_and_the_visitors_address_goes_along(
    two, origin, tmp_path
):
    here, there = two
    with agent_there(two, tmp_path, {APP: origin.port}):
        with here.gateway.dial(APP) as first, here.gateway.dial(APP) as second:
            first.send(request())
            target = origin.accept()
            for number, visitor in enumerate([first, second, first]):
                if number:
                    visitor.send(request(path=f"/{number}"))
                head = target.read_head()
                assert b"\r\nX-Forwarded-For: 127.0.0.1\r\n" in head
                target.send(answer(b"%d" % number))
                assert visitor.read_message()[1] == b"%d" % number
            assert origin.was_left_alone()
            target.close()  # the kept stream ends at both gateways
            wait_until(lambda: not there.peers.passages.running)
            first.send(request())
            again = origin.accept()
            again.read_head()
            again.send(answer(b"on a new one"))
            assert first.read_message()[1] == b"on a new one"


@pytest.mark.parametrize("agent", ["ours", "go"])
def test_websocket_passes(two, origin, tmp_path, request, agent):
    here, there = two
    with contextlib.ExitStack() as stack:
        if agent == "go":
            gopeer = request.getfixturevalue("gopeer")
            stack.enter_context(go_agent(gopeer, there.gateway, http={APP: origin.port}))
            here.sees(APP)
        else:
            stack.enter_context(agent_there(two, tmp_path, {APP: origin.port}))
        visitor = stack.enter_context(here.gateway.dial(APP))
        visitor.send(b"GET / HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n" % (
            APP.encode(), "\r\n".join(WEBSOCKET).encode()
        ))  # fmt: skip
        target = origin.accept()
        target.read_head()
        target.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\nhello")
        assert status_of(visitor.read_head()) == 101
        assert visitor.read_exactly(5) == b"hello"
        visitor.send(b"question")
        assert target.read_exactly(8) == b"question"
        target.send(b"bye")
        target.finish()
        assert visitor.read_to_end() == b"bye"
    here.sees_no(APP)


@pytest.mark.parametrize("size", [0, 1, 3 * MIB])
def test_an_upload_arrives_whole_and_so_does_its_answer(two, origin, tmp_path, size):
    here, _ = two
    data = noise(size)

    def echo(wire):
        head = wire.read_head()
        length = int(next(f for f in fields_of(head) if f.startswith("content-length"))[15:])
        wire.send(answer(wire.read_exactly(length)))

    origin.serve(echo)
    with agent_there(two, tmp_path, {APP: origin.port}), here.gateway.visitor(APP) as visitor:
        visitor.request("PUT", "/", data)
        got = visitor.getresponse().read()
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


def test_an_answer_that_is_cut_is_cut(two, origin, tmp_path):
    here, _ = two
    with agent_there(two, tmp_path, {APP: origin.port}), here.gateway.dial(APP) as visitor:
        visitor.send(request())
        target = origin.accept()
        target.read_head()
        target.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        assert status_of(visitor.read_head()) == 200
        assert visitor.read_exactly(4) == b"half"
        target.reset()
        with pytest.raises(CUT):
            visitor.read_to_end()


def test_a_visitor_that_leaves_frees_the_target(two, origin, tmp_path):
    here, _ = two
    with agent_there(two, tmp_path, {APP: origin.port}):
        with here.gateway.dial(APP) as visitor:
            visitor.send(request())
            target = origin.accept()
            target.read_head()
        with contextlib.suppress(ConnectionResetError):
            assert target.read() == b""


@pytest.mark.parametrize("agent", ["ours", "go"])
def test_tcp_mode_passes_a_half_close_on_as_far_as_the_agent_can(
    two, origin, tmp_path, request, agent
):
    """A Go agent would close its target at FIN, so that one is held back."""
    here, there = two
    with contextlib.ExitStack() as stack:
        if agent == "go":
            gopeer = request.getfixturevalue("gopeer")
            stack.enter_context(go_agent(gopeer, there.gateway, tcp={RAW: origin.port}))
            here.sees(RAW)
        else:
            stack.enter_context(agent_there(two, tmp_path, tcp={RAW: origin.port}))
        visitor = stack.enter_context(here.gateway.dial(RAW))
        visitor.send(b"question")
        target = origin.accept()
        assert target.read_exactly(8) == b"question"
        visitor.finish()
        if agent == "ours":
            assert target.read() == b""
        target.send(b"answer")
        assert visitor.read_exactly(6) == b"answer"
        target.finish()
        assert visitor.read_to_end() == b""
    here.sees_no(RAW)


def test_why_an_agent_refused_is_told(two, tmp_path):
    here, _ = two
    with agent_there(two, tmp_path, {APP: 1}, {RAW: 1}):
        with here.gateway.dial(APP) as visitor:
            visitor.send(request())
            head = visitor.read_head()
            assert status_of(head) == 502
            assert "x-gotunnel-error: target-unreachable" in fields_of(head)
        route = here.registry.lookup(RAW)
        with here.gateway.dial(RAW) as visitor, pytest.raises(CUT):
            visitor.read_to_end()
        wait_until(lambda: route.tunnel.failed[RAW] == 1)


def test_the_other_gateway_enforces_the_agents_policy(two, origin, tmp_path):
    here, _ = two
    tunnels = [{
        "hostname": APP, "target": f"127.0.0.1:{origin.port}",
        "basic_auth": ["me:" + hash_password("right")],
    }]  # fmt: skip
    with agent_there(two, tmp_path, {APP: origin.port}, tunnels=tunnels):
        assert here.gateway.get(APP)[0] == 401
        assert origin.was_left_alone()


def test_the_target_gets_the_visitors_address_if_it_wants_it(two, origin, tmp_path):
    here, _ = two
    tunnels = [{
        "hostname": RAW, "target": f"127.0.0.1:{origin.port}", "mode": "tcp",
        "proxy_protocol": "v1",
    }]  # fmt: skip
    with agent_there(two, tmp_path, tcp={RAW: origin.port}, tunnels=tunnels):
        with here.gateway.dial(RAW) as visitor:
            port = visitor.sock.getsockname()[1]
            line = origin.accept().read_until(b"\r\n").decode().split()
            assert line == ["PROXY", "TCP4", "127.0.0.1", "127.0.0.1", str(port),
                            str(here.gateway.public_port)]  # fmt: skip


def test_a_target_that_speaks_http2_gets_its_visits(two, origin, tmp_path):
    """Several after each other: their streams are kept, as those of HTTP/1.1 are."""
    here, _ = two
    pytest.importorskip("h2", reason="the Python package h2 is missing")
    connection, config = import_module("h2.connection"), import_module("h2.config")

    def serve(wire):
        h2 = connection.H2Connection(config.H2Configuration(client_side=False))
        h2.initiate_connection()
        wire.send(h2.data_to_send())
        while data := wire.read():
            for event in h2.receive_data(data):
                if type(event).__name__ == "RequestReceived":
                    h2.send_headers(event.stream_id, [(":status", "200")])
                    h2.send_data(event.stream_id, b"by HTTP/2", end_stream=True)
            wire.send(h2.data_to_send())

    origin.serve(serve)
    tunnels = [{"hostname": APP, "target": f"127.0.0.1:{origin.port}", "protocol": "h2c"}]
    with agent_there(two, tmp_path, {APP: origin.port}, tunnels=tunnels):
        for _ in range(3):
            assert here.gateway.get(APP) == (200, b"by HTTP/2")


def test_an_agent_of_a_pool_gets_its_share(two, origin, tmp_path):
    here, there = two
    tunnels = [{"hostname": APP, "target": f"127.0.0.1:{origin.port}", "pool": True}]
    origin.serve(lambda wire: (wire.read_head(), wire.send(answer(b"from the pool"))))
    with agent_there(two, tmp_path, {APP: origin.port}, tunnels=tunnels):
        assert here.gateway.get(APP) == (200, b"from the pool")
        member = there.registry.lookup(APP).pool.members[0]
        wait_until(lambda: member.visits == 0)


def test_a_target_that_is_not_well_gets_no_visit(two, origin, tmp_path):
    here, there = two
    with agent_there(two, tmp_path, {APP: origin.port}):
        there.registry.lookup(APP).tunnel.unwell = {APP: "it does not answer"}
        with here.gateway.dial(APP) as visitor:
            visitor.send(request())
            head = visitor.read_head()
            assert status_of(head) == 503
            assert "x-gotunnel-error: unhealthy" in fields_of(head)
            assert [field for field in fields_of(head) if field.startswith("retry-after: ")]
        assert origin.was_left_alone()


def test_who_serves_it_is_shown_with_the_member(two, origin, tmp_path):
    here, _ = two
    with agent_there(two, tmp_path, {APP: origin.port}):
        tunnel = here.registry.lookup(APP).tunnel
        assert isinstance(tunnel, PeerTunnel)
        assert str(tunnel.agent) == "agent 127.0.0.1 via host-00000001"
        assert tunnel.agent.identity.name == "127.0.0.1 via host-00000001"
        assert list(here.peers.served_elsewhere()) == [APP]


def test_an_agent_here_wins_at_once_and_the_peer_serves_again_when_it_leaves(two, origin, tmp_path):
    here, there = two
    folders = [tmp_path / name for name in ("there", "here")]
    for folder in folders:
        folder.mkdir()
    origin.serve(lambda wire: (wire.read_head(), wire.send(answer(b"from there"))))
    with agent_there(two, folders[0], {APP: origin.port}):
        assert here.gateway.get(APP) == (200, b"from there")
        with agent_here(here.gateway, folders[1], {APP: 1}):
            assert here.registry.lookup(APP).tunnel in here.inner.tunnels.registered()
            assert here.gateway.get(APP)[0] == 502
            assert there.registry.lookup(APP).tunnel in there.inner.tunnels.registered()
        assert here.gateway.get(APP) == (200, b"from there")
