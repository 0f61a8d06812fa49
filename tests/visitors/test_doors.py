"""The ways in to a hostname in tcp mode: plain bytes, silence, CONNECT, a port of its own, and
PostgreSQL's way into TLS. And what none of them lets in."""

import contextlib
import errno
import logging
import socket
import struct
import threading
import time
import types

import pytest
from raw_peer import spawn
from support import (
    APP,
    CUT,
    GATEWAY_HOST,
    MIB,
    RAW,
    SECRET,
    TIMEOUT,
    TUNNEL_HOST,
    Wire,
    agent_here,
    answer,
    fields_of,
    gateway_here,
    go_agent,
    reserved_port,
    status_of,
    tls_context,
    wait_until,
)

from gotunnel import ANY_PORT, PORTS, MessageReader, Register, Session, encode_message
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.registering import make_token
from gotunnel_server.agents import tunnel as tunnel_module
from gotunnel_server.agents.ports import PortRefused, Ports
from gotunnel_server.net.listener import Listener, PortError
from gotunnel_server.routes import Route
from gotunnel_server.visitors.sniff import (
    GSS_REQUEST,
    HTTP,
    OTHER,
    SSH,
    SSL_REQUEST,
    TLS,
    Recognised,
    recognise,
)

SECOND = "other.localhost"
SSL_ASKED = struct.pack("!II", 8, 80877103)
GSS_ASKED = struct.pack("!II", 8, 80877104)

# The first bytes ---------------------------------------------------------------------------------

KNOCKS = [
    (b"\x16\x03\x01\x02\x00\x01", Recognised(TLS)),
    (b"\x16GET", Recognised(TLS)),
    (b"SSH-2.0-OpenSSH_9.2p1\r\n", Recognised(SSH)),
    (b"SSH-", Recognised(SSH)),
    (b"GET / HTTP/1.1\r\n", Recognised(HTTP)),
    (b"SEARCH /", Recognised(HTTP)),
    (b"CONNECT a:1 HTTP/1.1", Recognised(HTTP)),
    (b"VERSION-CONTROL / HTTP/1.1", Recognised(HTTP)),
    (SSL_ASKED, Recognised(SSL_REQUEST, 8)),
    (SSL_ASKED + b"\x16\x03", Recognised(SSL_REQUEST, 8)),
    (GSS_ASKED, Recognised(GSS_REQUEST, 8)),
    (struct.pack("!II", 8, 196608), Recognised(OTHER)),
    (struct.pack("!II", 84, 196608), Recognised(OTHER)),
    (b"\x80\x2e\x01\x00\x02", Recognised(OTHER)),  # SSLv2
    (b"ssh-2.0", Recognised(OTHER)),
    (b"PING\r\n", Recognised(OTHER)),
    (b"get / HTTP/1.1\r\n", Recognised(OTHER)),
    (b"*1\r\n$4\r\nPING\r\n", Recognised(OTHER)),
    (b"\r\n", Recognised(OTHER)),
    (b"A" * 24, Recognised(OTHER)),
    (b"A" * 25 + b" ", Recognised(OTHER)),
]

AT_ONCE = 3  # seconds: far less than HEADER_TIMEOUT, far more than it takes


@pytest.mark.parametrize(("data", "expected"), KNOCKS, ids=lambda value: repr(value)[:24])
def test_first_bytes_say_the_same_however_they_are_cut(data, expected):
    verdicts = [recognise(data[:end]) for end in range(len(data) + 1)]
    assert verdicts[-1] == expected
    decided = [verdict for verdict in verdicts if verdict is not None]
    assert decided == [expected] * len(decided)


@pytest.mark.parametrize("data", [b"", b"S", b"SSH", b"G", b"GET", b"\0", SSL_ASKED[:7], b"A" * 23])
def test_too_few_bytes_decide_nothing(data):
    assert recognise(data) is None


# Ports, by themselves ----------------------------------------------------------------------------


class Door:
    def __init__(self):
        self.stopped = False

    def stop(self):
        self.stopped = True


class Doors(dict):
    """Stands in for opening ports. ``busy`` ones are in use by another program."""

    def __init__(self, busy=()):
        self.busy = busy

    def __call__(self, port, route):
        if port in self.busy:
            raise PortError(f"TCP_PORTS {port}: in use")
        self[port] = Door()
        return self[port]


def route(hostname, tunnel="tunnel"):
    return Route(hostname, "tcp", tunnel)


ALLOWED = (range(2200, 2203), range(5432, 5433))


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("80", "agents may not have port 80 (TCP_PORTS: 2200-2202, 5432)"),
        ("2201", "port 2201 is taken"),
        ("2202", "the gateway cannot open it: TCP_PORTS 2202: in use"),
        ("0", "port '0' came, expected 1 to 65535 or auto"),
        ("65536", "port '65536' came"),
        ("ssh", "port 'ssh' came"),
        ("", "port '' came"),
        ("\u0662\u0662", "port '\u0662\u0662' came"),
        ("9" * 5000, "port '99999999999999999999' came"),
    ],
)
def test_port_that_cannot_be_had_is_refused_by_a_sentence(wanted, sentence):
    ports = Ports(ALLOWED, Doors(busy={2202}))
    ports.open("2201", route(RAW))
    with pytest.raises(PortRefused) as caught:
        ports.open(wanted, route(SECOND))
    assert str(caught.value).startswith(sentence)


def test_no_more_ports_are_open_than_the_descriptors_are_for():
    ports = Ports(ALLOWED, Doors(), most=1)
    ports.open("2201", route(RAW))
    with pytest.raises(PortRefused, match="1 ports are open, as many as the gateway's limit"):
        ports.open(ANY_PORT, route(SECOND))


def test_gateway_without_ports_says_so():
    with pytest.raises(PortRefused, match="this gateway gives agents no public ports"):
        Ports((), Doors()).open("auto", route(RAW))


def test_any_port_is_one_that_is_free_until_there_is_none():
    ports = Ports(ALLOWED, Doors(busy={2200}))
    given = [ports.open("auto", route(f"{n}.example.com")) for n in range(3)]
    assert sorted(given) == [2201, 2202, 5432]
    with pytest.raises(PortRefused, match="cannot open it"):
        ports.open("auto", route(RAW))
    full = Ports((range(1, 2),), Doors())
    full.open("1", route(RAW))
    with pytest.raises(PortRefused, match=r"all ports are taken \(TCP_PORTS: 1\)"):
        full.open("auto", route(SECOND))


def test_hostname_gets_the_port_of_last_time_again():
    ports = Ports(ALLOWED, Doors())
    first = ports.open("auto", route(RAW, "one"))
    second = ports.open("auto", route(SECOND, "two"))
    for tunnel in ("one", "two"):
        ports.release(tunnel)
    assert ports.open("auto", route("third.example.com")) not in (first, second)
    assert ports.open("auto", route(SECOND)) == second
    assert ports.open("auto", route(RAW)) == first


def test_hostname_gets_the_same_port_after_a_restart_whoever_comes_first():
    names = [f"{number}.example.com" for number in range(20)]

    def given(order):
        ports = Ports((range(20000, 30000),), Doors())
        return {name: ports.open("auto", route(name)) for name in order}

    assert given(names) == given(reversed(names))


def test_any_port_is_rather_none_that_an_entry_names_or_another_agent_has_asked_for():
    ports = Ports((range(2200, 2204),), Doors(), named=lambda: frozenset({2200, 2202}))
    ports.open("2203", route(SECOND, "two"))
    ports.release("two")
    given = [ports.open("auto", route(f"{number}.example.com")) for number in range(4)]
    assert given[0] == 2201 and set(given[1:]) == {2200, 2202, 2203}  # when nothing better is left


def test_any_port_is_rather_none_that_an_agent_was_refused():
    for number in range(10):
        busy = {2200}
        ports = Ports((range(2200, 2202),), Doors(busy))
        with pytest.raises(PortRefused):
            ports.open("2200", route(SECOND))
        busy.clear()
        assert ports.open("auto", route(f"{number}.example.com")) == 2201
    with pytest.raises(PortRefused):
        ports.open("80", route(RAW))
    assert ports._asked == {2200}  # only ports that agents may have are remembered


@pytest.mark.parametrize(
    ("wanted", "for_now"),
    [("80", False), ("2201", True), ("2202", True), ("0", False), ("ssh", False)],
)
def test_a_port_is_refused_for_now_if_it_may_become_free(wanted, for_now):
    ports = Ports(ALLOWED, Doors(busy={2202}))
    ports.open("2201", route(RAW))
    with pytest.raises(PortRefused) as caught:
        ports.open(wanted, route(SECOND))
    assert caught.value.for_now is for_now


def test_port_that_its_credential_does_not_permit_is_not_opened():
    def why_not(port):
        return None if port == 5432 else f"not port {port}"

    doors = Doors()
    ports = Ports(ALLOWED, doors)
    with pytest.raises(PortRefused, match="^not port 2200$"):
        ports.open("2200", route(RAW), why_not)
    assert ports.open("auto", route(RAW), why_not) == 5432
    with pytest.raises(
        PortRefused, match="none of the free ports is for this agent: not port 2200"
    ):
        ports.open("auto", route(SECOND), why_not)
    assert list(doors) == [5432]


def test_ports_of_a_tunnel_end_with_it_and_no_others():
    doors = Doors()
    ports = Ports(ALLOWED, doors)
    ports.open("2200", route(RAW, "one"))
    ports.open("2201", route(SECOND, "two"))
    ports.release("one")
    assert (doors[2200].stopped, doors[2201].stopped) == (True, False)
    ports.open("2200", route(RAW, "three"))
    ports.close()
    assert not (doors[2200].stopped or doors[2201].stopped)  # they stop as all listeners do
    with pytest.raises(PortRefused, match="the gateway stops"):
        ports.open("2202", route(RAW))


# Plain bytes -------------------------------------------------------------------------------------


def dial(port) -> Wire:
    return Wire(socket.create_connection(("127.0.0.1", port), TIMEOUT))


def tunnel(hostname, target_port, mode="tcp", **keys):
    return {"hostname": hostname, "target": f"127.0.0.1:{target_port}", "mode": mode, **keys}


def field(head, name):
    """The value of a field, None if there is none."""
    values = [line.partition(": ")[2] for line in fields_of(head) if line.startswith(f"{name}: ")]
    return values[0] if values else None


@contextlib.contextmanager
def house(cache, tmp_path, *tunnels, **changes):
    """A gateway and its agent, which serves ``tunnels``."""
    with gateway_here(cache, **changes) as gateway:
        with agent_here(gateway, tmp_path, ready=False, tunnels=list(tunnels)):
            gateway.wait_for_routes(*(each["hostname"] for each in tunnels))
            yield gateway


def expect_closed(wire):
    """The end comes, and no byte before it."""
    with contextlib.suppress(ConnectionResetError):
        assert wire.read_to_end() == b""


def test_ssh_finds_the_only_tcp_hostname(cache, tmp_path, origin):
    tunnels = tunnel(RAW, origin.port), tunnel(APP, origin.port, "http")
    with house(cache, tmp_path, *tunnels) as gateway, dial(gateway.public_port) as visitor:
        for byte in b"SSH-2.0-x\r\n":
            visitor.send(bytes([byte]))
        with origin.accept() as target:
            assert target.read_exactly(11) == b"SSH-2.0-x\r\n"
            target.send(b"SSH-2.0-y\r\n")
            assert visitor.read_exactly(11) == b"SSH-2.0-y\r\n"


@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\n", b"\0\0\0\x54\0\3\0\0user"])
def test_plain_bytes_without_a_clear_goal_are_dropped(cache, tmp_path, origin, first):
    tunnels = [tunnel(RAW, origin.port), tunnel(SECOND, origin.port)]
    with house(cache, tmp_path, *tunnels) as gateway, dial(gateway.public_port) as visitor:
        visitor.send(first)
        expect_closed(visitor)
        assert origin.was_left_alone()


def test_only_ssh_finds_a_hostname_that_the_operator_has_not_named(cache, tmp_path, origin, caplog):
    with house(cache, tmp_path, tunnel(RAW, origin.port)) as gateway:
        for _ in range(3):
            with dial(gateway.public_port) as visitor:
                visitor.send(b"\0\0\0\x54\0\3\0\0user")
                expect_closed(visitor)
        assert origin.was_left_alone()
    lines = [r for r in caplog.records if "speaks no TLS" in r.message and r.levelno > logging.INFO]
    assert len(lines) == 1


@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\n", b"PING\r\n", b"\0\0\0\x54\0\3\0\0user"])
def test_raw_host_gets_whatever_is_not_tls_or_http(cache, tmp_path, origin, first):
    tunnels = [tunnel(RAW, origin.port), tunnel(SECOND, 9)]
    with house(cache, tmp_path, *tunnels, RAW_TCP_HOST=RAW) as gateway:
        with dial(gateway.public_port) as visitor:
            visitor.send(first)
            with origin.accept() as target:
                assert target.read_exactly(len(first)) == first


def test_server_that_speaks_first_greets_a_silent_visitor(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port), RAW_TCP_HOST=RAW) as gateway:
        with dial(gateway.public_port) as visitor, origin.accept() as target:
            target.send(b"220 hello\r\n")
            assert visitor.read_exactly(11) == b"220 hello\r\n"


def test_silent_visitor_without_a_raw_host_is_dropped_in_time(cache, tmp_path, origin):
    changes = {"HEADER_TIMEOUT": "0.5"}
    with house(cache, tmp_path, tunnel(RAW, origin.port), **changes) as gateway:
        with dial(gateway.public_port) as visitor:
            expect_closed(visitor)
        assert origin.was_left_alone()


@pytest.mark.parametrize("first", [b"", b"PING\r\n", b"SSH-2.0-x\r\n"])
def test_visitor_of_a_raw_host_that_is_away_is_reset_at_once(cache, first):
    with gateway_here(cache, RAW_TCP_HOST=RAW) as gateway, dial(gateway.public_port) as visitor:
        began = time.monotonic()
        visitor.send(first)
        with pytest.raises(ConnectionResetError):
            visitor.read()
        assert time.monotonic() - began < AT_ONCE


def test_visitor_of_a_tcp_hostname_whose_agent_has_left_is_reset_at_once(cache, tmp_path, origin):
    """Through TLS. Without its memory of modes, the gateway would send a web page."""
    with gateway_here(cache) as gateway:
        for mode in "tcp", "http", "tcp":
            with agent_here(gateway, tmp_path, **{mode: {RAW: origin.port}}):
                if mode == "http":  # the present mode counts
                    assert gateway.inner._registry.has_left_in_tcp(RAW) is False
            wait_until(lambda: not gateway.inner._registry.routes())
            if mode == "http":
                assert gateway.get(RAW)[0] == 502
                continue
            with gateway.dial(RAW) as visitor:
                began = time.monotonic()
                with pytest.raises(CUT):
                    visitor.read()
                assert time.monotonic() - began < AT_ONCE
        assert gateway.get(GATEWAY_HOST)[0] == 200


def test_silent_visitor_is_dropped_in_time_if_the_raw_host_is_away(cache, tmp_path, origin):
    changes = {"HEADER_TIMEOUT": "0.5", "RAW_TCP_HOST": SECOND}
    with house(cache, tmp_path, tunnel(RAW, origin.port), **changes) as gateway:
        with dial(gateway.public_port) as visitor:
            expect_closed(visitor)
        assert origin.was_left_alone()


def test_raw_host_in_http_mode_gets_no_raw_visit(cache, tmp_path, origin):
    tunnels = tunnel(APP, origin.port, "http")
    with house(cache, tmp_path, tunnels, RAW_TCP_HOST=APP) as gateway:
        with dial(gateway.public_port) as visitor:
            visitor.send(b"SSH-2.0-x\r\n")
            expect_closed(visitor)
        assert origin.was_left_alone()


def test_tls_is_served_beside_a_raw_host_also_when_its_hello_comes_in_pieces(
    cache, tmp_path, origin
):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    tunnels = [tunnel(RAW, origin.port), tunnel(APP, origin.port, "http")]
    with house(cache, tmp_path, *tunnels, RAW_TCP_HOST=RAW) as gateway:
        assert gateway.get(APP) == (200, b"page")


def test_first_line_without_an_end_is_cut_off(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port)) as gateway:
        for first in (b"GET /", b"a", b"\0"):
            with dial(gateway.public_port) as visitor:
                with contextlib.suppress(OSError):
                    visitor.send(first + b"x" * 10 * MIB)
                with contextlib.suppress(ConnectionResetError):
                    assert len(visitor.read_to_end()) < MIB
        assert origin.was_left_alone()


@pytest.mark.parametrize(
    ("method", "host", "path", "status", "location"),
    [
        ("GET", APP, "/a?b=c", 301, f"https://{APP}/a?b=c"),
        ("HEAD", APP, "/", 301, f"https://{APP}/"),
        ("POST", APP, "/", 308, f"https://{APP}/"),
        ("GET", f"{APP}:8080", "/", 301, f"https://{APP}:8080/"),
        ("GET", f"{APP}:443", "/", 301, f"https://{APP}/"),
        ("GET", APP, f"http://{APP}/x", 301, f"https://{APP}/x"),
        ("GET", GATEWAY_HOST, "/", 301, f"https://{GATEWAY_HOST}/"),
        ("GET", "elsewhere.example", "/", 502, None),
        ("GET", RAW, "/", 421, None),
        ("CONNECT", f"{RAW}:22", f"{RAW}:22", 403, None),
    ],
)
def test_http_without_tls_is_sent_to_https(
    cache, tmp_path, origin, method, host, path, status, location
):
    tunnels = [tunnel(RAW, origin.port), tunnel(APP, origin.port, "http")]
    with house(cache, tmp_path, *tunnels, RAW_TCP_HOST=RAW) as gateway:
        with dial(gateway.public_port) as visitor:
            visitor.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head = visitor.read_head()
            assert status_of(head) == status
            assert field(head, "location") == location
        assert origin.was_left_alone()


@pytest.mark.parametrize("asked", [SSL_ASKED, GSS_ASKED], ids=["ssl", "gss"])
def test_who_has_spoken_is_not_silent(cache, tmp_path, origin, asked):
    changes = {"RAW_TCP_HOST": RAW, "HEADER_TIMEOUT": "0.7"}
    with house(cache, tmp_path, tunnel(RAW, origin.port), **changes) as gateway:
        with dial(gateway.public_port) as visitor:
            visitor.send(asked)
            assert visitor.read_exactly(1) in b"SN"
            expect_closed(visitor)  # at HEADER_TIMEOUT, and not relayed as a silent visitor before
        assert origin.was_left_alone()


def test_hello_that_came_while_we_were_late_is_not_taken_for_silence(cache, tmp_path, origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with reserved_port() as raw:
        tunnels = [tunnel(RAW, raw), tunnel(APP, origin.port, "http")]
        with house(cache, tmp_path, *tunnels, RAW_TCP_HOST=RAW) as gateway:
            expired, go = threading.Event(), threading.Event()
            submit = gateway.inner._steps.submit

            def late(function, key=None):
                if function.__name__ == "expired":
                    expired.set()
                    submit(lambda: (go.wait(TIMEOUT), function()), key)
                else:
                    submit(function, key)

            (public,) = [one for one in gateway.inner.listeners._all if one.name == "gateway"]
            public._workers = types.SimpleNamespace(submit=late, crowded=False)
            sock = socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)
            assert expired.wait(TIMEOUT)
            threading.Timer(0.2, go.set).start()  # by then the hello has come
            secure = gateway.context.wrap_socket(sock, server_hostname=APP)
            with Wire(secure) as visitor:
                visitor.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
                assert visitor.read_message()[1] == b"page"


def test_postgresql_client_gets_one_no(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port)) as gateway:
        with dial(gateway.public_port) as visitor:
            visitor.send(GSS_ASKED)
            assert visitor.read_exactly(1) == b"N"
            visitor.send(GSS_ASKED)
            expect_closed(visitor)


# CONNECT -----------------------------------------------------------------------------------------


def connect(gateway, authority, sni=GATEWAY_HOST, behind=b"") -> tuple:
    """A visitor that has asked for ``authority``, and the head of the answer."""
    visitor = gateway.dial(sni)
    head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode()
    visitor.send(head + behind)
    return visitor, visitor.read_head()


def test_connect_leads_to_a_tcp_hostname(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port)) as gateway:
        for port in (origin.port, gateway.public_port):
            visitor, head = connect(gateway, f"{RAW}:{port}", behind=b"at once")
            with visitor, origin.accept() as target:
                assert status_of(head) == 200
                assert b"content-length" not in head.lower()
                assert target.read_exactly(7) == b"at once"
                visitor.finish()
                assert target.read_to_end() == b""
                target.send(b"and the answer")
                target.close()
                assert visitor.read_to_end() == b"and the answer"


@pytest.mark.parametrize(
    ("authority", "status", "code"),
    [
        (f"{RAW}:1", 403, "wrong-port"),
        (f"{APP}:443", 403, "not-tcp"),
        ("elsewhere.example:22", 502, "no-tunnel"),
        (f"{GATEWAY_HOST}:443", 502, "no-tunnel"),
        ("127.0.0.1:22", 502, "no-tunnel"),
        ("[::1]:22", 502, "no-tunnel"),
        (f"{RAW}:0", 403, "wrong-port"),
        (f"{RAW}:{'9' * 5000}", 400, "malformed-request"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_connect_leads_nowhere_else(cache, tmp_path, origin, authority, status, code):
    tunnels = [tunnel(RAW, origin.port), tunnel(APP, origin.port, "http")]
    with house(cache, tmp_path, *tunnels) as gateway:
        visitor, head = connect(gateway, authority)
        with visitor:
            assert (status_of(head), field(head, "x-gotunnel-error")) == (status, code)
        assert origin.was_left_alone()


def test_connect_with_a_body_is_refused(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port)) as gateway:
        for field_line in ("Content-Length: 5", "Transfer-Encoding: chunked"):
            with gateway.dial(GATEWAY_HOST) as visitor:
                authority = f"{RAW}:{origin.port}"
                head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{field_line}\r\n\r\n"
                visitor.send(head.encode())
                assert status_of(visitor.read_head()) == 400
        assert origin.was_left_alone()


def test_connect_on_another_hostnames_connection_is_misdirected(cache, tmp_path, origin):
    tunnels = [tunnel(RAW, origin.port), tunnel(APP, origin.port, "http")]
    with house(cache, tmp_path, *tunnels) as gateway:
        visitor, head = connect(gateway, f"{RAW}:{origin.port}", sni=APP)
        with visitor:
            assert status_of(head) == 421


# Ports of their own ------------------------------------------------------------------------------


@pytest.fixture
def free_port():
    with reserved_port() as port:
        yield port


def test_port_of_its_own_leads_to_its_tunnel_and_ends_with_it(
    cache, tmp_path, origin, free_port, caplog
):
    caplog.set_level(logging.INFO)
    changes = {"TCP_PORTS": str(free_port)}
    with gateway_here(cache, **changes) as gateway:
        tunnels = [tunnel(RAW, origin.port, port=str(free_port)), tunnel(SECOND, 9)]
        with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):
            gateway.wait_for_routes(RAW, SECOND)
            with dial(free_port) as visitor, origin.accept() as target:
                target.send(b"I speak first")
                assert visitor.read_exactly(13) == b"I speak first"
                visitor.send(b"GET / HTTP/1.1\r\n\r\n")
                assert target.read_exactly(18) == b"GET / HTTP/1.1\r\n\r\n"
                visitor.finish()
                assert target.read_to_end() == b""
                sender = spawn(lambda: (target.send(b"x" * 10 * MIB), target.finish()))
                assert visitor.read_to_end() == b"x" * 10 * MIB
                sender.result(TIMEOUT)
            assert f"{RAW}: on port {free_port} of the gateway" in caplog.text
        with pytest.raises(ConnectionRefusedError):
            wait_until(lambda: dial(free_port).close())
        with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):  # it is free again
            gateway.wait_for_routes(RAW)
            with dial(free_port) as visitor, origin.accept():
                pass


def test_port_that_is_not_given_leaves_its_tunnel_unserved_and_the_others_alone(
    cache, tmp_path, origin, free_port, caplog
):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    tunnels = [tunnel(RAW, origin.port, port=str(free_port)), tunnel(APP, origin.port, "http")]
    with house(cache, tmp_path, *tunnels, TCP_PORTS="1-2") as gateway:
        wait_until(
            lambda: f"{RAW}: not served: agents may not have port {free_port}" in caplog.text
        )
        with gateway.dial(RAW) as visitor, pytest.raises(CUT):
            visitor.read_to_end()
        assert gateway.get(APP) == (200, b"page")


@pytest.fixture
def soon(monkeypatch):
    """The gateway tries refused ports again at once."""
    monkeypatch.setattr(tunnel_module, "PORT_DELAY", 0.05)
    monkeypatch.setattr(tunnel_module, "MOST_PORT_DELAY", 0.1)


def lines_with(caplog, text):
    return [line for record in caplog.records if text in (line := record.getMessage())]


def test_port_that_another_program_has_is_given_when_that_one_ends(
    cache, tmp_path, origin, free_port, caplog, soon
):
    """The agent's session stays, so visits to its other hostnames go on."""
    caplog.set_level(logging.INFO)
    tunnels = [tunnel(RAW, origin.port, port=str(free_port)), tunnel(SECOND, origin.port)]
    busy = socket.create_server(("127.0.0.1", free_port))
    with busy, house(cache, tmp_path, *tunnels, TCP_PORTS=str(free_port)) as gateway:
        with gateway.dial(SECOND) as visitor, origin.accept() as target:
            time.sleep(0.5)  # several attempts, which are not logged
            assert "the gateway goes on trying" in lines_with(caplog, "not served")[0]
            busy.close()
            wait_until(lambda: lines_with(caplog, f"{RAW}: on port {free_port} of the gateway"))
            for knock in (lambda: dial(free_port), lambda: gateway.dial(RAW)):
                with knock() as door, origin.accept() as its_target:
                    its_target.send(b"hello")
                    assert door.read_exactly(5) == b"hello"
            target.send(b"still here")
            assert visitor.read_exactly(10) == b"still here"
            assert gateway.inner._registry.lookup(RAW).port == free_port
            (served,) = gateway.inner.tunnels.registered()
            assert served.routes[RAW].port == free_port
    assert len(lines_with(caplog, "gets no port")) == len(lines_with(caplog, "not served")) == 1


def test_port_that_another_agent_has_is_given_when_that_one_ends(
    cache, tmp_path, origin, free_port, caplog, soon
):
    caplog.set_level(logging.INFO)

    def serving(hostname, folder):
        folder.mkdir()
        tunnels = [tunnel(hostname, origin.port, port=str(free_port))]
        return agent_here(gateway, folder, ready=False, tunnels=tunnels)

    with gateway_here(cache, TCP_PORTS=str(free_port)) as gateway:
        with contextlib.ExitStack() as first:
            first.enter_context(serving(RAW, tmp_path / "first"))
            gateway.wait_for_routes(RAW)
            with serving(SECOND, tmp_path / "second"):
                gateway.wait_for_routes(SECOND)
                assert gateway.inner._registry.lookup(SECOND).port is None
                first.close()
                wait_until(lambda: gateway.inner._registry.lookup(SECOND).port == free_port)
                with dial(free_port) as visitor, origin.accept() as target:
                    target.send(b"hello")
                    assert visitor.read_exactly(5) == b"hello"
        wait_until(lambda: not gateway.inner._ports._open)


def test_late_look_at_ports_takes_none_from_a_session_that_is_about_to_serve(
    cache, tmp_path, origin, free_port
):
    """The session runs for a moment before the tunnel's stage is SERVING."""
    tunnels = [tunnel(RAW, origin.port, port=str(free_port))]
    with house(cache, tmp_path, *tunnels, TCP_PORTS=str(free_port)) as gateway:
        (served,) = gateway.inner.tunnels.registered()
        for stage, ports in ("CLAIMING", 1), ("SERVING", 1), ("LEAVING", 0):
            served._stage = tunnel_module.Stage[stage]
            served._try_ports()
            assert len(gateway.inner._ports._open) == ports


def test_agent_that_does_not_know_of_later_ports_gets_none(cache, free_port, soon):
    """Such an agent would refuse the visits."""
    with gateway_here(cache, TCP_PORTS=str(free_port)) as gateway:
        message = Register(
            make_token(SECRET, "", 60), {RAW: "127.0.0.1:9"}, {RAW: "tcp"},
            features=(PORTS,), ports={RAW: str(free_port)},
        )  # fmt: skip
        with socket.create_server(("127.0.0.1", free_port)), hand_made(gateway, message) as ack:
            assert "goes on trying" not in ack.refused[RAW]
            (served,) = gateway.inner.tunnels.registered()
            assert not served._missing


def test_port_that_fails_to_open_costs_no_hostname(cache, tmp_path, origin, free_port, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with gateway_here(cache, TCP_PORTS=str(free_port)) as gateway:
        tunnels = [tunnel(RAW, origin.port, port=str(free_port))]
        with monkeypatch.context() as patch:
            patch.setattr(Listener, "__init__", fail)
            with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):
                gateway.wait_for_routes(RAW)
        wait_until(lambda: gateway.inner._registry.lookup(RAW) is None)
        with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):
            gateway.wait_for_routes(RAW)
            with dial(free_port), origin.accept():
                pass


def test_defect_while_a_port_opens_costs_no_hostname(
    cache, tmp_path, origin, free_port, monkeypatch, caplog
):
    def fail(*_):
        raise RuntimeError("a defect")

    with gateway_here(cache, TCP_PORTS=str(free_port)) as gateway:
        monkeypatch.setattr(gateway.inner._ports, "open", fail)
        tunnels = [tunnel(RAW, origin.port, port=str(free_port))]
        with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):
            wait_until(lambda: "a defect" in caplog.text)
            wait_until(lambda: gateway.inner._registry.lookup(RAW) is None)


def test_agent_that_comes_again_finds_its_port_free(cache, tmp_path, origin, free_port, caplog):
    """The hostname is released after the port, never before."""
    with gateway_here(cache, TCP_PORTS=str(free_port)) as gateway:
        release, taken = gateway.inner._ports.release, []

        def look_then_release(owner):
            taken.append(gateway.inner._registry.lookup(RAW) is not None or not owner.routes)
            release(owner)

        gateway.inner._ports.release = look_then_release
        tunnels = [tunnel(RAW, origin.port, port=str(free_port))]
        with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):
            gateway.wait_for_routes(RAW)
        wait_until(lambda: gateway.inner._registry.lookup(RAW) is None)
    assert taken and all(taken)


def test_hostname_gets_one_port_however_often_it_is_asked_for(cache, free_port):
    spellings = [RAW, RAW.upper(), f"{RAW}.", "other.localhost", *(f"x{n}" for n in range(1000))]
    with gateway_here(cache, TCP_PORTS="1-65535") as gateway:
        message = Register(
            make_token(SECRET, "", 60), {RAW: "127.0.0.1:9"}, {RAW: "tcp"},
            features=(PORTS,), ports=dict.fromkeys(spellings, "auto") | {RAW: str(free_port)},
        )  # fmt: skip
        with hand_made(gateway, message) as ack:
            assert (ack.ports, ack.refused) == ({RAW: str(free_port)}, {})


@contextlib.contextmanager
def hand_made(gateway, message):
    """A registration that our agent would not send, and the gateway's answer."""
    duplex = Duplex(socket.create_connection(("127.0.0.1", gateway.tunnel_port), TIMEOUT))
    duplex.start_tls(gateway.context, server_side=False, server_hostname=TUNNEL_HOST)
    duplex.handshake_within(TIMEOUT)
    session = Session(duplex, client=True, name="hand-made")
    session.start()
    try:
        control, reader, messages = session.open(encode_message(message)), MessageReader(), []
        while not messages:
            messages = reader.feed(control.read(timeout=TIMEOUT))
        yield messages[0]
    finally:
        session.close()
        session.join()


def test_header_of_a_stranger_in_pieces_never_comes_whole(cache, tmp_path, origin, free_port):
    tunnels = tunnel(RAW, origin.port, port=str(free_port))
    with house(cache, tmp_path, tunnels, TCP_PORTS=str(free_port)):
        with dial(free_port) as visitor, origin.accept() as target:
            visitor.send(b"PRO")
            assert target.read_exactly(3) == b"PRO"
            with contextlib.suppress(OSError):
                visitor.send(b"XY TCP4 192.0.2.1 198.51.100.7 1 2\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert target.read_to_end() == b""


def test_gateway_counts_visits_whose_target_is_down(cache, tmp_path, free_port):
    with reserved_port() as down:
        tunnels = [tunnel(RAW, down, port=str(free_port))]
        with house(cache, tmp_path, *tunnels, TCP_PORTS=str(free_port)) as gateway:
            for visitor in (dial(free_port), gateway.dial(RAW)):
                with visitor, pytest.raises(CUT):
                    visitor.send(b"x")
                    visitor.read_to_end()
            (registered,) = gateway.inner.tunnels.registered()
            wait_until(lambda: registered.failed[RAW] == 2)


def test_go_agent_is_reached_by_the_doors_that_need_nothing_of_it(gopeer, cache, tmp_path, origin):
    with gateway_here(cache, RAW_TCP_HOST=RAW) as gateway:
        with go_agent(gopeer, gateway, tcp={RAW: origin.port}):
            gateway.wait_for_routes(RAW)
            with dial(gateway.public_port) as visitor, origin.accept() as target:
                target.send(b"hello")
                assert visitor.read_exactly(5) == b"hello"
            visitor, head = connect(gateway, f"{RAW}:{origin.port}")
            with visitor, origin.accept() as target:
                assert status_of(head) == 200
                target.send(b"hello")
                assert visitor.read_exactly(5) == b"hello"


# PostgreSQL --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), (GSS_ASKED,)], ids=["ssl", "gss, then ssl"])
def test_postgresql_client_is_led_into_tls(cache, tmp_path, origin, before):
    with house(cache, tmp_path, tunnel(RAW, origin.port)) as gateway:
        sock = socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)
        plain = Wire(sock)
        for request in before:
            plain.send(request)
            assert plain.read_exactly(1) == b"N"
        for byte in SSL_ASKED:
            plain.send(bytes([byte]))
        assert plain.read_exactly(1) == b"S"
        secure = tls_context(gateway.ca_file).wrap_socket(sock, server_hostname=RAW)
        with Wire(secure) as visitor, origin.accept() as target:
            visitor.send(b"startup")
            assert target.read_exactly(7) == b"startup"


@pytest.mark.parametrize("behind", [b"\x16\x03\x01", b"Q"], ids=["tls", "a query"])
def test_what_is_smuggled_in_before_tls_is_not_taken(cache, tmp_path, origin, behind):
    with house(cache, tmp_path, tunnel(RAW, origin.port), RAW_TCP_HOST=RAW) as gateway:
        with dial(gateway.public_port) as visitor:
            visitor.send(SSL_ASKED + behind)
            expect_closed(visitor)
        assert origin.was_left_alone()


@pytest.mark.parametrize("then", [b"\0\0\0\x08\0\3\0\0", b"GET / HTTP/1.1\r\n\r\n", SSL_ASKED])
def test_who_has_asked_for_tls_must_speak_it(cache, tmp_path, origin, then):
    with house(cache, tmp_path, tunnel(RAW, origin.port), RAW_TCP_HOST=RAW) as gateway:
        with dial(gateway.public_port) as visitor:
            visitor.send(SSL_ASKED)
            assert visitor.read_exactly(1) == b"S"
            visitor.send(then)
            expect_closed(visitor)
        assert origin.was_left_alone()


# Time --------------------------------------------------------------------------------------------


def test_idle_visit_ends_if_the_tunnel_says_so(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port, idle_timeout="1")) as gateway:
        with gateway.dial(RAW) as visitor, origin.accept() as target:
            visitor.send(b"x")
            assert target.read_exactly(1) == b"x"
            with pytest.raises(CUT):
                visitor.read_to_end()
            with contextlib.suppress(ConnectionResetError):
                assert target.read_to_end() == b""


def test_idle_visit_ends_also_if_its_target_has_half_closed(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port, idle_timeout="1")) as gateway:
        with gateway.dial(RAW) as visitor, origin.accept() as target:
            target.finish()
            assert visitor.read_to_end() == b""
            visitor.send(b"x")
            assert target.read_exactly(1) == b"x"
            with contextlib.suppress(ConnectionResetError):
                assert target.read_to_end() == b""


def test_visit_that_is_slow_is_not_idle(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port, idle_timeout="1")) as gateway:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        sock.settimeout(TIMEOUT)
        sock.connect(("127.0.0.1", gateway.public_port))
        secure = gateway.context.wrap_socket(sock, server_hostname=RAW)
        with Wire(secure) as visitor, origin.accept() as target:
            sender = spawn(lambda: (target.send(b"x" * 12 * MIB), target.finish()))
            for _ in range(6):
                visitor.read_exactly(1000)
                threading.Event().wait(0.25)  # longer than the timeout, in all
            assert len(visitor.read_to_end()) == 12 * MIB - 6000
            sender.result(TIMEOUT)


def test_visit_in_which_bytes_pass_one_way_only_is_not_idle(cache, tmp_path, origin):
    with house(cache, tmp_path, tunnel(RAW, origin.port, idle_timeout="1")) as gateway:
        with gateway.dial(RAW) as visitor, origin.accept() as target:
            for _ in range(6):
                target.send(b"x")
                assert visitor.read_exactly(1) == b"x"
                threading.Event().wait(0.25)  # longer than the timeout, in all
            visitor.send(b"y")
            assert target.read_exactly(1) == b"y"
