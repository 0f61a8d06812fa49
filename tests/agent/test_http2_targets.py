"""Targets that speak HTTP/2, through a gateway and an agent: ours, and one in Go.

The targets are servers on the library h2, and a real one of gRPC. visitors/test_http2_target.py has
what a target may say, by bytes.
"""

import contextlib
import ssl
import struct
import urllib.request
from concurrent import futures

import pytest
from support import APP, TIMEOUT, agent_here, gateway_here, go_agent, request, wait_until

from gotunnel_agent.status import describe
from gotunnel_server.certs.local_ca import Authority
from gotunnel_server.status import describe as describe_gateway

pytest.importorskip("h2", reason="the Python package h2 is missing")

from h2.config import H2Configuration  # noqa: E402
from h2.connection import H2Connection  # noqa: E402
from h2.events import DataReceived, RequestReceived, StreamEnded  # noqa: E402

TYPE = ("content-type", "application/grpc")


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """The CA of the targets, which no system trusts."""
    return Authority(tmp_path_factory.mktemp("authority"))


def serving(gateway, folder, target, protocol, **keys):
    tunnel = {"hostname": APP, "target": target, "protocol": protocol, **keys}
    return agent_here(gateway, folder, http={APP: 0}, tunnels=[tunnel])


def echo(wire):
    """A server of HTTP/2: its answer to each request is the path, and the body behind it."""
    h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
    h2.initiate_connection()
    wire.send(h2.data_to_send())
    paths, bodies = {}, {}
    while data := wire.read():
        for event in h2.receive_data(data):
            if isinstance(event, RequestReceived):
                paths[event.stream_id] = dict(event.headers)[":path"]
                bodies[event.stream_id] = b""
            elif isinstance(event, DataReceived):
                bodies[event.stream_id] += event.data
                h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, StreamEnded):
                number = event.stream_id
                h2.send_headers(number, [(":status", "200"), ("server", "echo")])
                body = paths[number].encode() + b" " + bodies[number]
                for at in range(0, len(body), 16384):
                    h2.send_data(number, body[at : at + 16384])
                h2.send_headers(number, [("x-sum", str(number))], end_stream=True)
        wire.send(h2.data_to_send())


def ask(gateway, path="/", body=b""):
    with gateway.visitor(APP) as visitor:
        visitor.request("POST" if body else "GET", path, body or None)
        response = visitor.getresponse()
        return response.status, response.read(), response.getheader("X-Gotunnel-Error")


def test_target_without_tls_is_spoken_to_by_prior_knowledge(gateway, tmp_path, origin):
    origin.serve(echo)
    with serving(gateway, tmp_path, f"http://127.0.0.1:{origin.port}", "h2c"):
        assert ask(gateway, "/a?b") == (200, b"/a?b ", None)
        assert ask(gateway, "/c", b"x" * 300_000) == (200, b"/c " + b"x" * 300_000, None)
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/d"))
            head, body = visitor.read_message()
            assert body == b"/d " and b"server: echo\r\n" in head


def test_connection_is_kept_for_other_visitors_and_bodies(gateway, tmp_path, origin):
    wires = []
    origin.serve(lambda wire: [wires.append(wire), echo(wire)])
    with serving(gateway, tmp_path, f"127.0.0.1:{origin.port}", "h2c"):
        for number in range(5):
            path, body = f"/{number}", b"%d" % number
            assert ask(gateway, path, body)[:2] == (200, path.encode() + b" " + body)
    assert len(wires) == 1


def test_status_and_dashboard_say_what_a_target_speaks(gateway, tmp_path):
    with serving(gateway, tmp_path, "127.0.0.1:1", "h2c") as agent:
        tunnels = gateway.inner.tunnels.registered()
        told = describe_gateway(tunnels, (), gateway.inner.keeper.state)
        assert [row["protocol"] for row in told["hostnames"]] == ["h2c"]
        assert [row["protocol"] for row in describe(agent.snapshot(), "agent.yaml")["tunnels"]] == [
            "h2c"
        ]
        page = urllib.request.urlopen(f"http://localhost:{gateway.dashboard_port}/")
        with contextlib.closing(page):
            assert b">http, h2c" in page.read()


def with_alpn(authority, *protocols):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("localhost"))
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


def test_target_with_tls_is_offered_h2(gateway, tmp_path, origin, authority):
    context, chosen = with_alpn(authority, "http/1.1", "h2"), []

    def serve(wire):
        wire.sock = context.wrap_socket(wire.sock, server_side=True)
        chosen.append(wire.sock.selected_alpn_protocol())
        echo(wire)

    origin.serve(serve)
    target, keys = f"https://localhost:{origin.port}", {"target_ca_file": str(authority.ca_file)}
    with serving(gateway, tmp_path, target, "h2", **keys):
        assert ask(gateway, "/a") == (200, b"/a ", None)
    assert chosen == ["h2"]


@pytest.mark.parametrize("protocols", [(), ("http/1.1",)], ids=["no alpn", "http/1.1 alone"])
def test_target_that_does_not_take_h2_is_named(
    gateway, tmp_path, origin, authority, caplog, protocols
):
    context = with_alpn(authority, *protocols)

    def serve(wire):
        with contextlib.suppress(OSError):
            wire.sock = context.wrap_socket(wire.sock, server_side=True)
            assert wire.read() == b""

    origin.serve(serve)
    target, keys = f"https://localhost:{origin.port}", {"target_ca_file": str(authority.ca_file)}
    with serving(gateway, tmp_path, target, "h2", **keys):
        assert ask(gateway)[::2] == (502, "target-unreachable")
    (line,) = [each.getMessage() for each in caplog.records if each.name == "gotunnel.target"]
    assert line == (
        f"{APP}: target {target}: its TLS does not take h2 by ALPN; remove protocol, or turn "
        "HTTP/2 on there"
    )


def test_target_that_speaks_http1_is_a_page(gateway, tmp_path, origin, caplog):
    def serve(wire):
        wire.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    origin.serve(serve)
    caplog.set_level("INFO")
    with serving(gateway, tmp_path, f"127.0.0.1:{origin.port}", "h2c"):
        assert ask(gateway)[::2] == (502, "bad-answer")
    assert "HTTP/1 came first, expected the SETTINGS of HTTP/2" in caplog.text


def test_agent_in_go_needs_the_gateways_setting(cache, gopeer, origin):
    origin.serve(echo)
    with gateway_here(cache, H2C_HOSTS=f"*.dev.localhost, {APP}") as gateway:
        with go_agent(gopeer, gateway, http={APP: origin.port}):
            for body in (b"", b"x" * 100_000, b"y"):
                assert ask(gateway, "/go", body) == (200, b"/go " + body, None)


def test_gateway_without_the_library_says_so(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("gotunnel_server.config._has_h2", lambda: False)
    with gateway_here(cache) as gateway:
        tunnel = {"hostname": APP, "target": "127.0.0.1:1", "protocol": "h2c"}
        with agent_here(gateway, tmp_path, ready=False, tunnels=[tunnel]):
            wait_until(lambda: "this gateway lacks the Python package h2" in caplog.text)


def test_real_server_of_grpc_answers_a_visitor_with_http1(gateway, tmp_path):
    """Its messages and trailers; a call of a method that it does not have is trailers only."""
    grpc = pytest.importorskip("grpc", reason="the Python package grpcio is missing")

    class Methods(grpc.GenericRpcHandler):
        def service(self, call):
            if call.method == "/a/Shout":
                return grpc.unary_unary_rpc_method_handler(lambda message, _: message.upper())

    pool = futures.ThreadPoolExecutor(2)
    server = grpc.server(pool, [Methods()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    fields = ("Content-Type: application/grpc", "TE: trailers")
    message = b"\0" + struct.pack("!L", 5) + b"hello"
    try:
        with serving(gateway, tmp_path, f"127.0.0.1:{port}", "h2c"):
            with gateway.dial(APP) as visitor:
                visitor.send(request("POST", "/a/Shout", *fields, body=message))
                visitor.read_head()
                body = visitor.read_until(b"0\r\n")
                assert b"HELLO" in body
                assert b"grpc-status: 0\r\n" in visitor.read_until(b"\r\n\r\n")
                visitor.send(request("POST", "/a/Nothing", *fields, body=message))
                head, body = visitor.read_message()
                assert b"grpc-status: 12\r\n" in head and body == b""
    finally:
        server.stop(0).wait(TIMEOUT)
        pool.shutdown()
