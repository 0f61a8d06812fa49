"""The agents' port: who may register what, whose session lives, and what strangers cannot do."""

import contextlib
import itertools
import json
import logging
import socket
import threading
import time

import jwt
import pytest
from hand_made import HOUR, HandMade, answering, registered, registration, reply_to
from support import (
    APP,
    GATEWAY_HOST,
    SECRET,
    TIMEOUT,
    TUNNEL_HOST,
    Wire,
    agent_here,
    answer,
    dial_tls,
    gateway_here,
    request,
    routes_of,
    tls_context,
    wait_until,
)

import gotunnel
from gotunnel import (
    DATA,
    GO_AWAY,
    HALF_CLOSE,
    INITIAL_WINDOW,
    PROTOCOL_ERROR,
    SYN,
    Ack,
    Header,
    Ping,
    Pong,
    SessionClosed,
    StreamReset,
    read_data_header,
)
from gotunnel_agent.common.hostnames import why_no_hostname
from gotunnel_agent.common.one_line import on_one_line
from gotunnel_server import gateway as gateway_module
from gotunnel_server.agents import heartbeat, newcomer
from gotunnel_server.net import listener

OWN = "reserved for the gateway itself"
LETTERS = "; expected letters, digits, hyphens and dots, or *. and at least two labels"
SOONER = 8  # seconds: less than a stranger has who says nothing (REGISTER_TIMEOUT)


def invalid(name):
    """The refusal of a name that is no hostname."""
    return f"invalid hostname: {on_one_line(name, 253)}{LETTERS}{why_no_hostname(name)}"


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture
def impatient(cache, monkeypatch):
    """A gateway that gives strangers half a second to register."""
    for module in (newcomer, gateway_module):
        monkeypatch.setattr(module, "REGISTER_TIMEOUT", 0.5)
    monkeypatch.setattr(listener, "SWEEP", 0.05)
    with gateway_here(cache) as gateway:
        yield gateway


def token(**changes):
    now = int(time.time())
    return jwt.encode({"iss": "x", "iat": now, "exp": now + HOUR, **changes}, SECRET, "HS256")


# Registration ------------------------------------------------------------------------------------


def test_registered_agent_is_acknowledged_and_served(gateway):
    with HandMade(gateway, registration(APP)) as agent:
        assert agent.hear() == Ack(True)
        assert routes_of(gateway.inner) == {APP}
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/by-hand"))
            stream = agent.session.accept(TIMEOUT)
            assert read_data_header(stream.read_exactly) == (APP, None, False)
            assert stream.read(timeout=TIMEOUT).startswith(b"GET /by-hand HTTP/1.1\r\n")
            stream.write(answer(b"hello"))
            assert visitor.read_message()[1] == b"hello"


def test_features_are_acknowledged_as_far_as_they_are_known(gateway):
    message = registration(APP, features=("levitation", HALF_CLOSE))
    assert reply_to(gateway, message) == Ack(True, features=(HALF_CLOSE,))


@pytest.mark.parametrize("sni", [TUNNEL_HOST, GATEWAY_HOST, None])
def test_agent_may_dial_either_name_or_none(gateway, sni):
    assert reply_to(gateway, registration(APP), sni=sni) == Ack(True)


def test_agents_port_has_no_certificate_for_other_names(gateway):
    with pytest.raises(OSError, match="(?i)unrecognized.name"):
        HandMade(gateway, sni=APP)


def test_token_may_come_under_its_other_name(gateway):
    message = {"type": "register", "auth_token": token(), "routes": {APP: "x"}}
    assert reply_to(gateway, json.dumps(message).encode()) == Ack(True)


def test_registration_may_come_in_pieces_with_any_white_space(gateway):
    message = {"type": "register", "token": token(), "routes": {APP: "x"}, "modes": None}
    with HandMade(gateway) as agent:
        for byte in json.dumps(message, indent=4).encode() + b"\r\n\t ":
            agent.control.write(bytes([byte]))
        assert agent.hear() == Ack(True)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "nonsense",
        jwt.encode({"exp": int(time.time()) + HOUR}, "x" * 32, "HS256"),
        token(exp=int(time.time()) - HOUR),
        jwt.encode({"exp": int(time.time()) + HOUR}, None, "none"),
    ],
    ids=["none", "nonsense", "other secret", "expired", "alg none"],
)
def test_bad_token_is_refused_with_the_reason_and_claims_nothing(gateway, bad):
    refused = reply_to(gateway, registration(APP, token=bad))
    assert not refused.ok and refused.error.startswith("auth failed: ")
    assert routes_of(gateway.inner) == set()


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (registration(), "no routes"),
        (registration(APP, GATEWAY_HOST), f"not allowed: {GATEWAY_HOST}: {OWN}"),
        (registration(TUNNEL_HOST), f"not allowed: {TUNNEL_HOST}: {OWN}"),
        (registration("no_name.localhost"), invalid("no_name.localhost")),
        (registration("*.localhost"), invalid("*.localhost")),
        (registration("*"), invalid("*")),
        (registration("*.com"), invalid("*.com")),
        (registration("a.*.com"), invalid("a.*.com")),
        (registration("xn--example-.com"), invalid("xn--example-.com")),
        (registration("127.0.0.1"), invalid("127.0.0.1")),
        (registration("a\nWARNING b"), invalid("a\nWARNING b")),
        (registration(APP, modes={APP: "\n"}), f"unknown mode of {APP}: \\n"),
        (registration(APP, modes={APP: "udp"}), f"unknown mode of {APP}: udp"),
        (
            registration(*(f"{n}.test" for n in range(51))),
            "too many hostnames: 51, at most 50 (MAX_HOSTS_PER_AGENT)",
        ),
    ],
)
def test_registration_is_refused_with_the_reason(gateway, message, error):
    assert reply_to(gateway, message) == Ack(False, error)
    assert routes_of(gateway.inner) == set()


def test_claim_takes_all_or_nothing(gateway):
    with registered(gateway, "b.localhost") as first, answering(first):
        refused = reply_to(gateway, registration("a.localhost", "b.localhost", "c.localhost"))
        assert refused == Ack(False, "host already registered: b.localhost")
        assert routes_of(gateway.inner) == {"b.localhost"}
        assert reply_to(gateway, registration("a.localhost", "c.localhost")) == Ack(True)


def test_hostnames_are_one_in_any_case_and_with_a_port(gateway):
    with registered(gateway, "App.LocalHost:8443", "APP.localhost") as agent, answering(agent):
        assert routes_of(gateway.inner) == {APP}
        refused = reply_to(gateway, registration("aPP.localhost"))
        assert refused == Ack(False, f"host already registered: {APP}")


def test_hostname_is_free_when_the_session_has_ended(gateway):
    for _ in range(3):
        with HandMade(gateway, registration(APP)) as agent:
            assert agent.hear() == Ack(True)
        wait_until(lambda: not routes_of(gateway.inner))


def test_hostname_is_free_as_soon_as_the_agent_leaves(gateway):
    """With GO_AWAY; what runs goes on."""
    with HandMade(gateway, registration(APP)) as agent:
        assert agent.hear() == Ack(True)
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            stream = agent.session.accept(TIMEOUT)
            agent.session.leave()
            wait_until(lambda: not routes_of(gateway.inner))
            assert reply_to(gateway, registration(APP)) == Ack(True)
            stream.write(answer(b"the last word"))
            assert visitor.read_message()[1] == b"the last word"


def test_refusals_are_logged_once(gateway, caplog):
    caplog.set_level(logging.INFO, "gotunnel")
    for _ in range(5):
        reply_to(gateway, registration(APP, token="nonsense"))
    lines = [record for record in caplog.records if "auth failed" in record.message]
    assert [record.levelname for record in lines] == ["WARNING"]


def test_no_log_line_shows_a_token(gateway, caplog):
    caplog.set_level(logging.DEBUG, "gotunnel")
    secret_part = token().rpartition(".")[2]
    reply_to(gateway, registration(APP, token=token() + "x"))
    reply_to(gateway, registration(APP, token=token()))
    assert caplog.records and secret_part not in caplog.text


# Heartbeat ---------------------------------------------------------------------------------------


@pytest.fixture
def quick_heart(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "PING_INTERVAL", 0.1)
    monkeypatch.setattr(heartbeat, "PONG_TIMEOUT", 0.3)


def test_agent_that_answers_pings_stays(quick_heart, gateway):
    with HandMade(gateway, registration(APP)) as agent:
        assert agent.hear() == Ack(True)
        before = time.time() * 1000
        for _ in range(10):  # a second: long enough to be dropped twice
            ping = agent.hear()
            assert isinstance(ping, Ping) and ping.ts >= int(before)
            agent.say(Pong(ping.ts))
        assert routes_of(gateway.inner) == {APP}


def test_silent_agent_is_dropped_and_its_hostname_is_free(quick_heart, gateway):
    with HandMade(gateway, registration(APP)) as agent:
        assert agent.hear() == Ack(True)
        with contextlib.suppress(SessionClosed):
            while agent.hear() is not None:
                pass
        wait_until(lambda: not routes_of(gateway.inner))


def test_agent_whose_host_is_stopped_is_dropped_too(quick_heart, gateway, monkeypatch):
    """It reads nothing any more, and its end of the connection says nothing."""
    monkeypatch.setattr(gotunnel, "FLUSH_TIMEOUT", 0.1)
    with HandMade(gateway, registration(APP)) as agent:
        assert agent.hear() == Ack(True)
        stopped = threading.Event()
        agent.session.call_later(0, lambda: stopped.wait(TIMEOUT))  # in its demultiplexer
        wait_until(lambda: not routes_of(gateway.inner))
        stopped.set()


# Strangers ---------------------------------------------------------------------------------------


def dial(gateway):
    return dial_tls(gateway.tunnel_port, TUNNEL_HOST, tls_context(gateway.ca_file))


def opening(payload):
    """The control stream's first frame: SYN, and what should have been a registration."""
    return Header(DATA, SYN, 1, len(payload)).encode() + payload


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "version of yamux": bytes([1]) + bytes(11),
    "type of frame": bytes([0, 9]) + bytes(10),
    "even id": Header(DATA, SYN, 2, 0).encode(),
    "huge frame": Header(DATA, SYN, 1, 0xFFFFFFFF).encode(),
    "list": opening(b"[]\n"),
    "no json": opening(b"{,}\n"),
    "no registration": opening(b'{"type":"ping","ts":1}\n'),
    "no type": opening(b'{"hello":1}\n'),
    "unknown types without end": opening(b'{"type":"hello"}\n' * 2000),
    "list of routes": opening(b'{"type":"register","token":"x","routes":[]}\n'),
    "number as token": opening(b'{"type":"register","token":1,"routes":{}}\n'),
    "half a character": opening(b'{"type":"register","token":"\\ud800","routes":{"a":"b"}}\n'),
    "endless": opening(b"{" + b" " * 70_000),
    "deep": opening(b'{"a":' * 9000 + b"1" + b"}" * 9000),
}


@pytest.fixture
def neighbour(gateway, tmp_path, origin):
    """An agent whose visits must go on; call it to make one."""
    with agent_here(gateway, tmp_path, http={APP: origin.port}):

        def visit():
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                with origin.accept() as target:
                    target.read_head()
                    target.send(answer(b"fine"))
                    assert visitor.read_message()[1] == b"fine"

        yield visit


@pytest.fixture
def soon_parted(monkeypatch):
    """A stranger that was refused, and waits for the end of its connection, has it soon."""
    monkeypatch.setattr(newcomer, "PARTING_TIMEOUT", 0.1)
    monkeypatch.setattr(listener, "SWEEP", 0.05)


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_that_connection_and_no_other(
    soon_parted, gateway, neighbour, garbage, caplog
):
    caplog.set_level(logging.DEBUG, "gotunnel")
    with dial(gateway) as stranger:
        stranger.sock.settimeout(SOONER)
        with contextlib.suppress(ConnectionError):
            stranger.send(garbage)
            stranger.read_to_end()
    neighbour()
    assert "a bug" not in caplog.text and "Traceback" not in caplog.text


def test_garbage_is_told_apart_from_a_plain_end(gateway):
    with dial(gateway) as stranger:
        stranger.send(GARBAGE["version of yamux"])
        assert stranger.read_to_end().endswith(Header(GO_AWAY, 0, 0, PROTOCOL_ERROR).encode())


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x02\x01\x00"])
def test_garbage_instead_of_tls_ends_that_connection_and_no_other(gateway, neighbour, garbage):
    with Wire(socket.create_connection(("127.0.0.1", gateway.tunnel_port))) as stranger:
        stranger.send(garbage)
        stranger.finish()
        with contextlib.suppress(ConnectionError):
            stranger.read_to_end()
    neighbour()


def test_registered_agent_that_breaks_the_rules_loses_its_session_alone(gateway, neighbour):
    with dial(gateway) as agent:
        message = registration("rude.localhost")
        agent.send(opening(message))
        gateway.wait_for_routes("rude.localhost")
        agent.send(bytes([7]) * 12)
        with contextlib.suppress(ConnectionError):
            agent.read_to_end()
    wait_until(lambda: routes_of(gateway.inner) == {APP})
    neighbour()


def test_agent_that_sends_more_than_the_window_permits_is_stopped(gateway, neighbour):
    """Bytes for the control stream, of which the gateway reads only messages."""
    with dial(gateway) as agent:
        message = registration("rude.localhost")
        agent.send(opening(message))
        gateway.wait_for_routes("rude.localhost")
        with contextlib.suppress(OSError):
            for _ in range(100):
                agent.send(Header(DATA, 0, 1, INITIAL_WINDOW).encode() + b"{" * INITIAL_WINDOW)
    wait_until(lambda: routes_of(gateway.inner) == {APP})
    neighbour()


def test_silence_is_dropped_in_time(impatient):
    with Wire(socket.create_connection(("127.0.0.1", impatient.tunnel_port))) as stranger:
        assert stranger.read_to_end() == b""


def test_silence_after_the_handshake_is_dropped_in_time(impatient):
    with dial(impatient) as stranger:
        with contextlib.suppress(OSError):
            stranger.read_to_end()


def test_who_trickles_a_registration_is_dropped_in_time(impatient):
    """A byte at a time, each of them quick enough, and never an end."""
    with HandMade(impatient) as stranger:
        with pytest.raises(ConnectionError):
            for piece in itertools.chain([b'{"'], itertools.repeat(b"x")):
                stranger.control.write(piece)
                with contextlib.suppress(TimeoutError):
                    stranger.control.read(timeout=0.02)


def test_strangers_hold_no_thread(impatient):
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            address = ("127.0.0.1", impatient.tunnel_port)
            stack.enter_context(Wire(socket.create_connection(address)))
        with HandMade(impatient, registration(APP)) as agent:
            assert agent.hear() == Ack(True)
            assert threading.active_count() - before < 40  # the steps' pool, and the agent's own


def test_agent_that_opens_a_second_stream_has_it_reset(gateway):
    with HandMade(gateway, registration(APP)) as agent:
        assert agent.hear() == Ack(True)
        stream = agent.session.open(b"hello?")
        with pytest.raises(StreamReset):
            stream.read(timeout=TIMEOUT)
        assert not agent.session.ended


def test_each_agent_that_is_refused_is_named_once(gateway, caplog):
    for agent in ("agent a at 192.0.2.1", "agent b at 192.0.2.1", "agent a at 192.0.2.1"):
        gateway.inner._newcomers.refusals.log(agent, "not allowed: x.test")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [f"agent {name} at 192.0.2.1 refused: not allowed: x.test" for name in "ab"]


def test_a_hostname_that_has_a_certificate_is_no_warning(gateway, caplog):
    with registered(gateway, APP):
        pass
    assert "visitors are refused" not in caplog.text
