"""The wire against the Go ends: a Go agent with our gateway, our agent with a Go gateway."""

import contextlib
import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import (
    APP,
    MIB,
    RAW,
    SECRET,
    TIMEOUT,
    agent_here,
    answer,
    at_length,
    gateway_here,
    go_agent,
    go_gateway,
    nginx,
    request,
    reserved_port,
    routes_of,
    status_of,
    wait_until,
)

import gotunnel
from gotunnel import MessageReader, Pong
from gotunnel_agent import link as link_module
from gotunnel_server.agents import control_stream, heartbeat
from gotunnel_server.visitors import relays

SIZES = [1024, 8 * MIB, at_length(64 * MIB)]
VISITORS = 50
BOTH = ["go agent", "go gateway"]


@contextlib.contextmanager
def pair(which, gopeer, cache, folder, **ports):
    """A gateway with its agent, of which one is the Go end."""
    if which == "go agent":
        with gateway_here(cache) as gateway, go_agent(gopeer, gateway, **ports):
            gateway.wait_for_routes(*ports.get("http", ()), *ports.get("tcp", ()))
            yield gateway
    else:
        with go_gateway(gopeer, cache) as gateway, agent_here(gateway, folder, **ports):
            yield gateway


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("size", SIZES)
def test_http_carries_files_both_ways(gopeer, cache, tmp_path, which, size):
    content = random.Random(size).randbytes(size)
    with nginx(tmp_path) as port, pair(which, gopeer, cache, tmp_path, http={APP: port}) as gateway:
        with gateway.visitor(APP) as visitor:
            visitor.request("PUT", "/file", content)
            response = visitor.getresponse()
            assert (response.status, response.read()) == (201, b"")
        assert digest((tmp_path / "file").read_bytes()) == digest(content)
        status, body = gateway.get(APP, "/file")
        assert status == 200 and digest(body) == digest(content)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("size", SIZES)
def test_tcp_carries_bytes_both_ways(gopeer, cache, tmp_path, origin, which, size):
    up, down = (random.Random(size + n).randbytes(size) for n in range(2))
    with pair(which, gopeer, cache, tmp_path, tcp={RAW: origin.port}) as gateway:
        with gateway.dial(RAW) as visitor, origin.accept() as target:
            came = []
            for sender, receiver, data in ((visitor, target, up), (target, visitor, down)):
                reading = threading.Thread(
                    target=lambda receiver=receiver: came.append(receiver.read_exactly(size))
                )
                reading.start()
                sender.send(data)
                reading.join(3 * TIMEOUT)
            assert [digest(data) for data in came] == [digest(up), digest(down)]


def echo(target):
    while True:
        head, body = target.read_message()
        target.send(answer(head.split(b" ")[1] + b" " + body))


@pytest.mark.parametrize("which", BOTH)
def test_many_visitors_at_once_each_get_their_own_answers(gopeer, cache, tmp_path, origin, which):
    origin.serve(echo)
    with pair(which, gopeer, cache, tmp_path, http={APP: origin.port}) as gateway:

        def visit(number):
            with gateway.visitor(APP) as visitor:
                for turn in range(4):
                    path = f"/{number}/{turn}"
                    body = random.Random(path).randbytes(10_000)
                    visitor.request("PUT", path, body)
                    response = visitor.getresponse()
                    assert (response.status, response.read()) == (200, path.encode() + b" " + body)

        with ThreadPoolExecutor(VISITORS) as pool:
            list(pool.map(visit, range(VISITORS)))


@pytest.mark.parametrize("which", BOTH)
def test_many_tcp_visits_at_once_are_kept_apart(gopeer, cache, tmp_path, origin, which):
    def echo_bytes(target):
        while data := target.read():
            target.send(data)

    origin.serve(echo_bytes)
    with pair(which, gopeer, cache, tmp_path, tcp={RAW: origin.port}) as gateway:

        def visit(number):
            with gateway.dial(RAW) as visitor:
                for turn in range(4):
                    data = random.Random(f"{number} {turn}").randbytes(10_000)
                    visitor.send(data)
                    assert visitor.read_exactly(len(data)) == data

        with ThreadPoolExecutor(VISITORS) as pool:
            list(pool.map(visit, range(VISITORS)))


@pytest.mark.parametrize("which", BOTH)
def test_one_session_survives_hundreds_of_visits(gopeer, cache, tmp_path, origin, which):
    """A second FIN on a stream, or a stream that is never ended, would show here."""
    origin.serve(echo)
    with pair(which, gopeer, cache, tmp_path, http={APP: origin.port}) as gateway:
        for _ in range(10):
            with gateway.visitor(APP) as visitor:
                for turn in range(30):
                    body = b"x" * (turn * 100)
                    visitor.request(("GET", "POST")[turn % 2], f"/{turn}", body)
                    response = visitor.getresponse()
                    assert response.read() == b"/%d %b" % (turn, body)
        if gateway.program:
            assert not any("session ended" in line for line in gateway.program.lines)
        else:
            (session,) = gateway.inner.tunnels.registered()
            assert session.identity.issuer == "go"


@pytest.mark.parametrize("which", BOTH)
def test_go_sends_next_to_no_frame_that_nobody_needs(
    gopeer, cache, tmp_path, origin, monkeypatch, which
):
    """Also if visitors leave in the middle of an answer or of an upload; most of what it sends then
    is made up for by the streams that are over."""
    for name in ("WASTE_A_STREAM", "WASTE_A_SECOND", "WASTE_A_STREAM_SECOND"):
        monkeypatch.setattr(gotunnel, name, 0)
    monkeypatch.setattr(gotunnel, "WASTE", 50)

    def serve(target):
        while head := target.read_head():
            if b"/small" in head:
                target.send(answer())
                continue
            target.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (10 * MIB))
            with contextlib.suppress(OSError):
                for _ in range(160):
                    target.send(bytes(64 * 1024))

    def leave_early(number):
        with gateway.dial(APP) as visitor:
            if number % 2:
                head = request("PUT", "/", f"Content-Length: {10 * MIB}")
                with contextlib.suppress(OSError):
                    visitor.send(head + bytes(300_000))
            else:
                visitor.send(request())
                visitor.read()

    origin.serve(serve)
    with pair(which, gopeer, cache, tmp_path, http={APP: origin.port}) as gateway:
        with ThreadPoolExecutor(10) as pool:
            for _ in range(4):
                list(pool.map(leave_early, range(40)))
                assert gateway.get(APP, "/small") == (200, b"ok")
        if gateway.program:
            assert not any("session ended" in line for line in gateway.program.lines)
        else:
            (tunnel,) = gateway.inner.tunnels.registered()
            assert tunnel._session._mux.strays + tunnel._session._mux._pings > 0


# A Go agent with our gateway ---------------------------------------------------------------------


@pytest.mark.parametrize("field", ["token", "auth_token"])
def test_go_agent_registers_with_either_name_of_the_token(gopeer, cache, origin, field):
    with gateway_here(cache) as gateway:
        with go_agent(gopeer, gateway, "-token-field", field, http={APP: origin.port}):
            assert routes_of(gateway.inner) == {APP}


def test_go_agent_is_refused_in_words_that_it_understands(gopeer, cache, origin):
    http = {APP: origin.port}
    with gateway_here(cache) as gateway:
        with go_agent(gopeer, gateway, http=http, secret=SECRET[::-1], ready=False) as agent:
            agent.wait_for("^refused: auth failed: the token's signature does not fit: ")
        with go_agent(gopeer, gateway, http=http):
            with go_agent(gopeer, gateway, http=http, ready=False) as second:
                second.wait_for(f"^refused: host already registered: {APP}$")


def test_go_agent_answers_our_pings(gopeer, cache, origin, monkeypatch):
    """More than once: it would lose what comes in the same read as another message."""
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "PING_INTERVAL", 0.1)
    monkeypatch.setattr(heartbeat, "PONG_TIMEOUT", 0.5)
    pongs = []

    class NotingReader(MessageReader):
        def feed(self, data):
            messages = super().feed(data)
            pongs.extend(message for message in messages if isinstance(message, Pong))
            return messages

    monkeypatch.setattr(control_stream, "MessageReader", NotingReader)
    with gateway_here(cache) as gateway, go_agent(gopeer, gateway, http={APP: origin.port}):
        wait_until(lambda: len(pongs) > 10)
        assert routes_of(gateway.inner) == {APP}


def test_go_agent_gets_the_hostname_as_it_registered_it(gopeer, cache, origin):
    """It looks it up as it stands."""
    origin.serve(echo)
    with gateway_here(cache) as gateway:
        with go_agent(gopeer, gateway, http={"App.LocalHost": origin.port}):
            assert gateway.get(APP, "/found") == (200, b"/found ")


def test_visitors_half_close_is_held_back_from_a_go_agent(gopeer, cache, origin):
    """It would close its target at once, and the answer would be lost."""
    with gateway_here(cache) as gateway, go_agent(gopeer, gateway, tcp={RAW: origin.port}):
        with gateway.dial(RAW) as visitor, origin.accept() as target:
            visitor.send(b"question")
            visitor.finish()
            assert target.read_exactly(8) == b"question"
            target.send(bytes(MIB))
            target.send(b"answer")
            target.close()
            assert visitor.read_to_end() == bytes(MIB) + b"answer"


def test_visitor_of_a_go_agent_that_has_left_does_not_keep_its_target(
    gopeer, cache, origin, monkeypatch
):
    monkeypatch.setattr(relays, "HELD_FIN_TIMEOUT", 0.1)
    with gateway_here(cache) as gateway, go_agent(gopeer, gateway, tcp={RAW: origin.port}):
        with gateway.dial(RAW) as visitor, origin.accept() as target:
            visitor.close()
            assert target.read_to_end() == b""


def test_go_agents_lost_session_frees_its_hostnames(gopeer, cache, origin):
    with gateway_here(cache) as gateway:
        with go_agent(gopeer, gateway, http={APP: origin.port}):
            pass
        wait_until(lambda: not routes_of(gateway.inner))


def test_go_agent_comes_back_after_a_restart(gopeer, cache, origin):
    with gateway_here(cache) as gateway, go_agent(gopeer, gateway, http={APP: origin.port}) as go:
        gateway.inner.tunnels.close()
        go.wait_for("^session ended: ")
        gateway.wait_for_routes(APP)


def test_websocket_goes_through_a_go_agent(gopeer, cache, origin):
    with gateway_here(cache) as gateway, go_agent(gopeer, gateway, http={APP: origin.port}):
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/", "Connection: Upgrade", "Upgrade: chat"))
            with origin.accept() as target:
                target.read_head()
                target.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\nfirst")
                assert status_of(visitor.read_head()) == 101
                assert visitor.read_exactly(5) == b"first"
                visitor.send(b"second")
                assert target.read_exactly(6) == b"second"


# Our agent with a Go gateway ---------------------------------------------------------------------


def test_our_agent_answers_the_go_gateways_pings(gopeer, cache, tmp_path, origin):
    with go_gateway(gopeer, cache, "-ping", "50ms") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: gateway.program.lines.count("pong") > 10)
            assert not any("session ended" in line for line in gateway.program.lines)


@pytest.mark.parametrize("host", ["app.localhost:8443", "APP.LocalHost", "App.localhost:443"])
def test_our_agent_finds_its_route_by_any_spelling_of_the_visitors_host(
    gopeer, cache, tmp_path, origin, host
):
    origin.serve(echo)
    with go_gateway(gopeer, cache) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}), gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/found", host=host))
            assert visitor.read_message()[1] == b"/found "


def test_our_agent_understands_the_go_gateways_refusal(gopeer, cache, tmp_path, origin, caplog):
    with go_gateway(gopeer, cache) as gateway:
        keys = {"jwt_secret": SECRET[::-1], "ready": False}
        with agent_here(gateway, tmp_path, {APP: origin.port}, **keys):
            wait_until(lambda: "the gateway refused: auth failed; " in caplog.text)


def test_early_answer_comes_through_a_go_gateway(gopeer, cache, tmp_path, origin):
    """It sends the whole request before it reads: our agent must go on taking it."""
    refuse = answer(b"too large", "Connection: close", status="413 Content Too Large")
    origin.serve(lambda target: [target.read_head(), target.send(refuse), target.finish(),
                                 target.read_to_end()])  # fmt: skip
    with go_gateway(gopeer, cache) as gateway, agent_here(gateway, tmp_path, {APP: origin.port}):
        with gateway.visitor(APP) as visitor:
            with contextlib.suppress(BrokenPipeError):
                visitor.request("POST", "/", bytes(10 * MIB))
            assert visitor.getresponse().status == 413


def test_target_that_is_down_is_our_agents_502_at_a_go_gateway(gopeer, cache, tmp_path):
    with reserved_port() as port, go_gateway(gopeer, cache) as gateway:
        with agent_here(gateway, tmp_path, {APP: port}), gateway.visitor(APP) as visitor:
            visitor.request("GET", "/")
            response = visitor.getresponse()
            assert response.status == 502
            assert response.getheader("X-Gotunnel-Error") == "target-unreachable"


def test_half_close_of_a_visitor_reaches_our_agents_target(gopeer, cache, tmp_path, origin):
    with go_gateway(gopeer, cache) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: origin.port}):
            with gateway.dial(RAW) as visitor, origin.accept() as target:
                visitor.send(b"question")
                visitor.finish()
                assert target.read_to_end() == b"question"
                target.send(b"answer")
                target.close()
                assert visitor.read_to_end() == b"answer"


def test_an_agent_whose_go_gateway_sends_go_away_serves_on_by_the_old_session(
    gopeer, cache, tmp_path, origin, monkeypatch
):
    """For such a gateway the old session has the hostname as long as it lives."""
    monkeypatch.setattr(link_module, "GO_AWAY_LOOK", 0.05)
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 0.05)
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with go_gateway(gopeer, cache, "-go-away", "300ms", "-ping", "200ms") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            for line in ("^sent GoAway", "^refused: host already registered"):
                gateway.program.wait_for(line)
                for _ in range(20):
                    assert gateway.get(APP) == (200, b"page")
            pongs = gateway.program.lines.count("pong")
            wait_until(lambda: gateway.program.lines.count("pong") > pongs + 2)
            assert "session ended" not in "\n".join(gateway.program.lines)
