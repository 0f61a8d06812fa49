"""The PROXY protocol, end to end: sent to targets, and read from trusted proxies."""

import collections
import contextlib
import logging
import socket

import pytest
from proxy_reader import SIGNATURE, reader  # noqa: F401, a fixture
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    TIMEOUT,
    Wire,
    agent_here,
    answer,
    fields_of,
    gateway_here,
    request,
    reserved_port,
    wait_until,
)

from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.proxy_protocol import (
    VERSIONS,
    Source,
    encode,
    encode_unknown,
    parse,
)
from gotunnel_server import capacity

GATEWAY_LOG = "gotunnel.arrival"
VISITOR = Source("203.0.113.9", 56324)  # as a front proxy tells it
DESTINATION = ("198.51.100.7", 443)
TRUSTED = {"TRUSTED_PROXIES": "127.0.0.1"}
STRANGE = {"TRUSTED_PROXIES": "192.0.2.1"}  # that trusted proxy is not who visits here
PIECES = 55  # a header of version 1 is that long; what trickles for longer is slowed down
AT_ONCE = 3  # seconds: little beside HEADER_TIMEOUT, for a busy machine
# Addresses of this machine; all of 127.0.0.0/8 are, on Linux at least.
HERE, ALSO_HERE = "127.0.0.1", "127.0.0.2"


def serving(gateway, folder, target_port, *, mode="http", version=None, **keys):
    """An agent with one tunnel, of APP or RAW; ``version`` is its proxy_protocol, ``keys`` are
    more of the tunnel's."""
    hostname = APP if mode == "http" else RAW
    tunnel = {"hostname": hostname, "target": f"127.0.0.1:{target_port}", "mode": mode, **keys}
    if version:
        tunnel["proxy_protocol"] = version
    return agent_here(gateway, folder, **{mode: {hostname: target_port}}, tunnels=[tunnel])


@contextlib.contextmanager
def pair(cache, folder, target_port, *, mode="http", version=None, **environment):
    """A gateway and an agent that is serving()."""
    with gateway_here(cache, **environment) as gateway:
        with serving(gateway, folder, target_port, mode=mode, version=version):
            yield gateway


def connect(gateway, address=HERE):
    """A connection from one of this machine's addresses, on which nothing was said yet."""
    try:
        sock = socket.create_connection((HERE, gateway.public_port), TIMEOUT, (address, 0))
    except OSError as error:
        pytest.skip(f"nobody can come from {address} here: {error}")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def with_tls(sock, gateway, hostname):
    try:
        context = gateway.context
        sock = context.wrap_socket(sock, server_hostname=hostname, suppress_ragged_eofs=False)
    except BaseException:
        sock.close()
        raise
    return Wire(sock)


def told(target):
    """Read the header at the start of a target's connection, and no byte behind it: the visitor
    that it names, None if it names none."""
    data = b""
    while (said := parse(data)) is None:
        data += target.read_exactly(1)
    return said[1]


def own_address(visitor):
    return Source(*visitor.sock.getsockname())


def repeat_what_was_told(target):
    """A target's script: answer each request with the visitor that the connection is for."""
    source = told(target)
    while True:
        target.read_message()
        target.send(answer(f"{source.address} {source.port}".encode()))


def visit(visitor) -> Source:
    """One request, answered by repeat_what_was_told()."""
    visitor.send(request())
    head, body = visitor.read_message()
    assert head.startswith(b"HTTP/1.1 200 "), head
    address, port = body.decode().split()
    return Source(address, int(port))


def is_cut_off(sock):
    """Whether the gateway ends a connection without a word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


# To the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_http_target_is_told_the_visitor(cache, tmp_path, origin, version):
    with pair(cache, tmp_path, origin.port, version=version) as gateway:
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/first"))
            target = origin.accept()
            assert told(target) == own_address(visitor)
            assert target.read_head().startswith(b"GET /first HTTP/1.1\r\n")
            target.send(answer(b"one"))
            assert visitor.read_message()[1] == b"one"


@pytest.mark.parametrize("version", VERSIONS)
def test_tcp_target_is_told_the_visitor(cache, tmp_path, origin, version):
    with pair(cache, tmp_path, origin.port, mode="tcp", version=version) as gateway:
        with gateway.dial(RAW) as visitor, origin.accept() as target:
            # Before a word of the visitor's, since a target may want to speak first.
            assert told(target) == own_address(visitor)
            target.send(b"SSH-2.0-target\r\n")
            assert visitor.read_until(b"\n") == b"SSH-2.0-target\r\n"
            visitor.send(b"SSH-2.0-visitor\r\n")
            assert target.read_until(b"\n") == b"SSH-2.0-visitor\r\n"


def test_tcp_target_is_told_who_came_by_connect(cache, tmp_path, origin):
    with pair(cache, tmp_path, origin.port, mode="tcp", version="v1") as gateway:
        with gateway.dial(GATEWAY_HOST) as visitor:
            name = f"{RAW}:{origin.port}"
            visitor.send(request("CONNECT", name, host=name))
            assert visitor.read_head().startswith(b"HTTP/1.1 200 ")
            with origin.accept() as target:
                assert told(target) == own_address(visitor)
                visitor.send(b"hello\n")
                assert target.read_until(b"\n") == b"hello\n"


def test_target_is_told_nothing_unless_its_tunnel_says_so(cache, tmp_path, origin):
    with pair(cache, tmp_path, origin.port) as gateway, gateway.dial(APP) as visitor:
        visitor.send(request("GET", "/plain"))
        target = origin.accept()
        assert target.read_head().startswith(b"GET /plain HTTP/1.1\r\n")
        target.send(answer())
        assert visitor.read_message()[1] == b"ok"


@pytest.mark.parametrize("version", VERSIONS)
def test_nginx_knows_the_visitor(cache, tmp_path, reader, version):  # noqa: F811
    with pair(cache, tmp_path, reader, version=version) as gateway:
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            address, port, *_ = visitor.read_message()[1].decode().split()
            assert Source(address, int(port)) == own_address(visitor)


@pytest.mark.parametrize("version", VERSIONS)
def test_target_connection_is_one_visitors_only(cache, tmp_path, origin, version):
    """Connections to a target are kept for later requests, which may be another visitor's."""
    origin.serve(repeat_what_was_told)
    with pair(cache, tmp_path, origin.port, version=version) as gateway:
        with contextlib.ExitStack() as open_ones:
            visitors = [
                open_ones.enter_context(with_tls(connect(gateway, address), gateway, APP))
                for address in (HERE, ALSO_HERE, HERE)
            ]
            for _ in range(3):  # in turn, so that a kept connection is there each time
                for visitor in visitors:
                    assert visit(visitor) == own_address(visitor)
        for address in (ALSO_HERE, HERE):  # and when those have left
            with with_tls(connect(gateway, address), gateway, APP) as visitor:
                assert visit(visitor) == own_address(visitor)


# From a front proxy ------------------------------------------------------------------------------


@pytest.fixture(params=["at once", "in pieces", "with what follows"])
def send(request, monkeypatch):
    """send(sock, header), in one of three ways in which it may come."""
    if request.param == "in pieces":  # whatever the sender does, it is read byte by byte
        receive, reads = Duplex._receive_plain, collections.Counter()

        def receive_few(self, size):
            reads[self] += 1
            return receive(self, 1 if reads[self] <= PIECES else size)

        monkeypatch.setattr(Duplex, "_receive_plain", receive_few)

    def send(sock, header):
        if request.param == "with what follows":
            if not hasattr(socket, "TCP_CORK"):
                pytest.skip("two writes cannot be one segment here")
            # Until it is switched off again, or 200 ms have passed.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        sock.sendall(header)

    return send


def behind_proxy(gateway, hostname, header, send=socket.socket.sendall):
    """A visitor's TLS connection behind a header."""
    sock = connect(gateway)
    send(sock, header)
    wire = with_tls(sock, gateway, hostname)
    if hasattr(socket, "TCP_CORK"):
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    return wire


@pytest.mark.parametrize("version", VERSIONS)
def test_http_visitor_behind_a_trusted_proxy_is_who_it_says(cache, tmp_path, origin, version, send):
    header = encode(version, VISITOR, DESTINATION)
    with pair(cache, tmp_path, origin.port, **TRUSTED) as gateway:
        with behind_proxy(gateway, APP, header, send) as visitor:
            for number in range(2):  # also when the connection is kept
                # The proxy speaks for its visitor, the visitor for nobody else.
                visitor.send(request("GET", f"/{number}", "X-Forwarded-For: 1.2.3.4"))
                if number == 0:
                    target = origin.accept()
                said = fields_of(target.read_head())
                assert f"x-forwarded-for: {VISITOR.address}" in said
                assert f"x-real-ip: {VISITOR.address}" in said
                target.send(answer())
                assert visitor.read_message()[1] == b"ok"


def test_ipv6_visitor_behind_a_trusted_proxy_is_who_it_says(cache, tmp_path, origin):
    header = encode("v2", ("2001:db8::9", 1), ("2001:db8::1", 443))
    with pair(cache, tmp_path, origin.port, **TRUSTED) as gateway:
        with behind_proxy(gateway, APP, header) as visitor:
            visitor.send(request())
            target = origin.accept()
            assert "x-real-ip: 2001:db8::9" in fields_of(target.read_head())
            target.send(answer())
            visitor.read_message()


@pytest.mark.parametrize("version", VERSIONS)
def test_target_is_told_the_visitor_behind_a_trusted_proxy(cache, tmp_path, origin, version):
    """The visitor's address goes through both of us, and each writes its own version."""
    other = VERSIONS[1 - VERSIONS.index(version)]
    header = encode(other, VISITOR, DESTINATION)
    origin.serve(repeat_what_was_told)
    with pair(cache, tmp_path, origin.port, version=version, **TRUSTED) as gateway:
        with behind_proxy(gateway, APP, header) as visitor:
            assert visit(visitor) == VISITOR


@pytest.mark.parametrize("version", VERSIONS)
def test_visitors_behind_one_proxy_share_no_target_connection(cache, tmp_path, origin, version):
    origin.serve(repeat_what_was_told)
    with pair(cache, tmp_path, origin.port, version=version, **TRUSTED) as gateway:
        for number in (1, 2, 3):
            source = Source(f"203.0.113.{number}", number)
            header = encode(version, source, DESTINATION)
            with behind_proxy(gateway, APP, header) as visitor:
                assert visit(visitor) == source


@pytest.mark.parametrize("version", VERSIONS)
def test_ssh_visitor_behind_a_trusted_proxy_is_who_it_says(cache, tmp_path, origin, version, send):
    header = encode(version, VISITOR, DESTINATION)
    with pair(cache, tmp_path, origin.port, mode="tcp", version="v2", **TRUSTED) as gateway:
        with Wire(connect(gateway)) as visitor:
            send(visitor.sock, header)
            visitor.send(b"SSH-2.0-visitor\r\n")
            with origin.accept() as target:
                assert told(target) == VISITOR
                assert target.read_until(b"\n") == b"SSH-2.0-visitor\r\n"
                target.send(b"SSH-2.0-target\r\n")
                assert visitor.read_until(b"\n") == b"SSH-2.0-target\r\n"


def test_silent_visitor_behind_a_trusted_proxy_hears_the_target(cache, tmp_path, origin):
    """After the header the visitor has sent nothing: it waits for the server's greeting."""
    header = encode("v1", VISITOR, DESTINATION)
    environment = {**TRUSTED, "RAW_TCP_HOST": RAW}
    with pair(cache, tmp_path, origin.port, mode="tcp", version="v1", **environment) as gateway:
        with Wire(connect(gateway)) as visitor:
            visitor.send(header)
            with origin.accept(AT_ONCE) as target:
                assert told(target) == VISITOR
                target.send(b"220 ready\r\n")
                assert visitor.read_until(b"\n") == b"220 ready\r\n"


@contextlib.contextmanager
def own_port(cache, folder, target_port, *, version=None, **environment):
    """A visitor at a public port that leads to RAW alone."""
    with contextlib.ExitStack() as up:
        port = up.enter_context(reserved_port())
        gateway = up.enter_context(gateway_here(cache, TCP_PORTS=str(port), **environment))
        keys = {"mode": "tcp", "version": version, "port": str(port)}
        up.enter_context(serving(gateway, folder, target_port, **keys))
        yield up.enter_context(Wire(wait_until(lambda: connect_if_open(port))))


def connect_if_open(port):
    with contextlib.suppress(ConnectionRefusedError):
        return socket.create_connection((HERE, port), TIMEOUT)


def test_port_of_its_own_believes_a_trusted_proxy(cache, tmp_path, origin, send):
    with own_port(cache, tmp_path, origin.port, version="v1", **TRUSTED) as visitor:
        send(visitor.sock, encode("v2", VISITOR, DESTINATION))
        visitor.send(b"hello\n")
        with origin.accept() as target:
            assert told(target) == VISITOR
            assert target.read_until(b"\n") == b"hello\n"


def test_trusted_proxy_without_a_header_hears_the_target_of_a_port(cache, tmp_path, origin):
    with own_port(cache, tmp_path, origin.port, version="v1", **TRUSTED) as visitor:
        with origin.accept(AT_ONCE) as target:
            assert told(target) == own_address(visitor)
            target.send(b"220 ready\r\n")
            assert visitor.read_until(b"\n") == b"220 ready\r\n"


@pytest.mark.parametrize(
    "header", [encode_unknown("v1"), encode_unknown("v2"), b""], ids=["unknown", "local", "none"]
)
def test_trusted_proxy_that_names_nobody_visits_itself(cache, tmp_path, origin, header):
    origin.serve(repeat_what_was_told)
    with pair(cache, tmp_path, origin.port, version="v1", **TRUSTED) as gateway:
        with behind_proxy(gateway, APP, header) as visitor:
            assert visit(visitor) == own_address(visitor)


def test_trusted_proxy_may_name_a_visitor_in_its_fields_instead(cache, tmp_path, origin):
    with pair(cache, tmp_path, origin.port, **TRUSTED) as gateway, gateway.dial(APP) as visitor:
        visitor.send(request("GET", "/", f"X-Forwarded-For: {VISITOR.address}"))
        target = origin.accept()
        assert f"x-real-ip: {VISITOR.address}" in fields_of(target.read_head())
        target.send(answer())
        visitor.read_message()


@pytest.mark.parametrize("mode", ["http", "tcp"])
@pytest.mark.parametrize("version", VERSIONS)
def test_stranger_with_a_header_is_cut_off(cache, tmp_path, origin, version, send, mode):
    """Any other first bytes would be relayed to RAW_TCP_HOST."""
    header = encode(version, VISITOR, DESTINATION)
    environment = {**STRANGE, "RAW_TCP_HOST": RAW}
    with pair(cache, tmp_path, origin.port, mode=mode, **environment) as gateway:
        with connect(gateway) as sock:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # cut off already
                send(sock, header)
                sock.sendall(b"SSH-2.0-visitor\r\n")
            assert is_cut_off(sock)
        assert origin.was_left_alone()


@pytest.mark.parametrize("version", VERSIONS)
def test_stranger_with_a_header_is_cut_off_at_a_port_of_its_own(cache, tmp_path, origin, version):
    """On such a port the target is connected before a byte has come, since it may greet first."""
    with own_port(cache, tmp_path, origin.port, **STRANGE) as visitor:
        with origin.accept() as target:
            visitor.send(encode(version, VISITOR, DESTINATION))
            assert is_cut_off(visitor.sock)
            with contextlib.suppress(ConnectionResetError):
                assert target.read_to_end() == b""


BROKEN = {
    "v1": b"PROXY TCP4 203.0.113.9 198.51.100.7 56324\r\n",
    "v1 without end": b"PROXY UNKNOWN " + b"x" * 200,
    "v2": SIGNATURE + b"\x31\x11\0\x0c" + bytes(12),
    "v2 too long": SIGNATURE + b"\x21\x11\xff\xff",
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_broken_header_of_a_trusted_proxy_is_cut_off_and_logged(
    cache, tmp_path, origin, caplog, header
):
    caplog.set_level(logging.INFO, GATEWAY_LOG)
    with pair(cache, tmp_path, origin.port, mode="tcp", **TRUSTED) as gateway:
        with connect(gateway) as sock:
            sock.sendall(header)
            assert is_cut_off(sock)
        assert origin.was_left_alone()
        lines = wait_until(lambda: lines_of(caplog))
    assert len(lines_of(caplog)) == 1
    assert HERE in lines[0] and "expected" in lines[0]


def lines_of(caplog):
    return [line.getMessage() for line in caplog.records if line.name == GATEWAY_LOG]


def test_half_a_header_does_not_wait_for_ever(cache, tmp_path, origin):
    environment = {**TRUSTED, "HEADER_TIMEOUT": "1"}
    with pair(cache, tmp_path, origin.port, mode="tcp", **environment) as gateway:
        with connect(gateway) as sock:
            sock.sendall(encode("v1", VISITOR, DESTINATION)[:-1])
            assert is_cut_off(sock)
        assert origin.was_left_alone()


# The ports for plain HTTP ------------------------------------------------------------------------


def ask_plainly(port, *pieces):
    """The answer to a request on a port for plain HTTP, behind ``pieces`` of a header."""
    with Wire(socket.create_connection((HERE, port), TIMEOUT)) as visitor:
        for piece in pieces:
            visitor.send(piece)
        visitor.send(request(host=GATEWAY_HOST))
        return visitor.read_message()[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_plain_ports_believe_a_trusted_proxy(cache, version):
    """A CA may look for its proof there, and visitors are redirected."""
    header = encode(version, VISITOR, DESTINATION)
    with gateway_here(cache, HTTP_PORT="auto", **TRUSTED) as gateway:
        statuses = {gateway.inner.http_port: b" 301 ", gateway.dashboard_port: b" 200 "}
        for port, status in statuses.items():
            for pieces in ((), (header,), tuple(header[at : at + 1] for at in range(len(header)))):
                assert status in ask_plainly(port, *pieces).split(b"\r\n")[0]


def test_a_visitor_of_a_plain_port_has_the_share_of_its_own_address(cache, monkeypatch):
    taken = []
    header = encode("v2", VISITOR, DESTINATION)
    with gateway_here(cache, HTTP_PORT="auto", **TRUSTED) as gateway:
        port = gateway.inner.http_port
        (plain,) = (p for p in gateway.inner._visitor_ports if p.listener.port == port)
        enter = plain.exchanges.room.enter
        monkeypatch.setattr(
            plain.exchanges.room, "enter", lambda address: taken.append(address) or enter(address)
        )
        ask_plainly(port, header)
    assert taken == [VISITOR.address]


def test_visitors_that_a_proxy_brings_to_the_plain_port_count_as_all_do(cache, monkeypatch):
    """A proxy that ends TLS brings all visitors there: both ports share their limits."""
    monkeypatch.setattr(capacity, "HTTP_CONNECTIONS", 1)
    with gateway_here(cache, HTTP_PORT="auto", MAX_CONNECTIONS="3", **TRUSTED) as gateway:
        public = gateway.inner._visitors
        (plain,) = (
            p for p in gateway.inner._visitor_ports if p.listener.port == gateway.inner.http_port
        )
        for shared in ("exchanges", "relays", "parting"):
            assert getattr(plain, shared) is getattr(public, shared)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                sock = socket.create_connection((HERE, gateway.inner.http_port), TIMEOUT)
                stack.enter_context(sock)
            wait_until(lambda: gateway.inner._visitor_places.taken == 3)
            with socket.create_connection((HERE, gateway.public_port), TIMEOUT) as fourth:
                assert fourth.recv(1) == b""


def test_a_stranger_with_a_header_gets_nothing_at_a_plain_port(cache):
    with gateway_here(cache, HTTP_PORT="auto", **STRANGE) as gateway:
        head = ask_plainly(gateway.inner.http_port, encode("v1", VISITOR, DESTINATION))
        assert b" 400 " in head.split(b"\r\n")[0]


def test_a_silent_trusted_proxy_of_a_plain_port_is_closed_in_time(cache):
    with gateway_here(cache, HTTP_PORT="auto", HEADER_TIMEOUT="0.5", **TRUSTED) as gateway:
        with socket.create_connection((HERE, gateway.inner.http_port), TIMEOUT) as sock:
            sock.settimeout(TIMEOUT)
            while sock.recv(1000):  # a page may say so
                pass
