"""Targets of all kinds: TLS, unix sockets, a Host of their own, and those that cannot be reached.

The targets are real: a TLS origin with a certificate of an Authority, a listening unix socket. Each
visit goes through a gateway and an agent.
"""

import contextlib
import logging
import socket
import ssl
import threading
import types

import pytest
from support import (
    APP,
    RAW,
    TIMEOUT,
    Origin,
    agent_here,
    answer,
    deaf_port,
    fields_of,
    gateway_here,
    go_gateway,
    request,
    reserved_port,
    status_of,
    wait_until,
)

from gotunnel import Register, StreamReset, encode_message
from gotunnel_agent import link as link_module
from gotunnel_agent import plan
from gotunnel_agent import target as target_module
from gotunnel_agent.trust import CannotTrust
from gotunnel_server.certs import local_ca as authority_module
from gotunnel_server.certs.local_ca import Authority

OTHER = "other.localhost"  # a second hostname of an agent


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture
def impatient(monkeypatch):
    """A target has half a second to answer."""
    monkeypatch.setattr(target_module, "DIAL_TIMEOUT", 0.5)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """The CA of the targets, which no system trusts."""
    return Authority(tmp_path_factory.mktemp("authority"))


def serving(gateway, folder, target, mode="http", **keys):
    """An agent with one tunnel to a target as the configuration writes it."""
    hostname = APP if mode == "http" else RAW
    tunnel = {"hostname": hostname, "target": target, "mode": mode, **keys}
    return agent_here(gateway, folder, http={hostname: 0}, tunnels=[tunnel])


def with_tls(wire, authority, name="localhost"):
    """Answer the agent's TLS handshake at a connection that a target has accepted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(name))
    wire.sock = context.wrap_socket(wire.sock, server_side=True, suppress_ragged_eofs=False)
    return wire


def refused(gateway, caplog):
    """The code word of a visit's 502, and the agent's last line about its targets."""
    with gateway.visitor(APP) as visitor:
        visitor.request("GET", "/")
        response = visitor.getresponse()
        response.read()
        assert response.status == 502
    lines = [record.getMessage() for record in caplog.records if record.name == "gotunnel.target"]
    return response.getheader("X-Gotunnel-Error"), lines[-1]


# TLS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1"])
def test_target_with_tls(gateway, tmp_path, origin, authority, name):
    keys = {"target_ca_file": str(authority.ca_file)}
    with serving(gateway, tmp_path, f"https://{name}:{origin.port}", **keys):
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            with with_tls(origin.accept(), authority, name.lower()) as target:
                assert target.read_head().startswith(b"GET / ")
                target.send(answer(b"hello"))
                assert visitor.read_message()[1] == b"hello"
                visitor.send(request("GET", "/again"))  # on the same connection
                assert target.read_head().startswith(b"GET /again ")


def test_plain_target_stays_plain_beside_one_with_tls(gateway, tmp_path, origin):
    origin.serve(lambda wire: [wire.read_head(), wire.send(answer())])
    tunnels = [
        {"hostname": OTHER, "target": f"https://localhost:{origin.port}"},
        {"hostname": APP, "target": f"localhost:{origin.port}"},
    ]
    with agent_here(gateway, tmp_path, http={APP: 0, OTHER: 0}, tunnels=tunnels):
        assert gateway.get(APP) == (200, b"ok")


def test_target_with_tls_learns_the_name_and_not_the_visitors(gateway, tmp_path, origin, authority):
    names = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("localhost"))
    context.sni_callback = lambda tls, name, context: names.append(name)
    keys = {"target_ca_file": str(authority.ca_file)}
    with serving(gateway, tmp_path, f"https://LOCALHOST:{origin.port}", **keys):
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            with contextlib.closing(
                context.wrap_socket(origin.accept().sock, server_side=True)
            ) as target:
                assert target.recv(4) == b"GET "
                assert names == ["localhost"]


def test_target_with_tls_in_tcp_mode_passes_half_close_on(gateway, tmp_path, origin, authority):
    keys = {"target_ca_file": str(authority.ca_file)}
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}", "tcp", **keys):
        with gateway.dial(RAW) as visitor:
            visitor.send(b"question")
            with with_tls(origin.accept(), authority) as target:
                assert target.read_exactly(8) == b"question"
                visitor.finish()
                assert target.read_to_end() == b""
                target.send(b"answer")
                target.finish()
                assert visitor.read_to_end() == b"answer"


def test_any_certificate_will_do_if_the_operator_says_so(gateway, tmp_path, origin, authority):
    keys = {"target_skip_tls_verify": "true"}
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}", **keys):
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            with with_tls(origin.accept(), authority, OTHER) as target:
                target.read_head()
                target.send(answer())
                assert status_of(visitor.read_head()) == 200


@pytest.mark.parametrize(
    ("name", "trusted", "problem"),
    [
        (
            "localhost",
            False,
            "certificate in certificate chain); name its CA in target_ca_file",
        ),
        (OTHER, True, "is not valid for 'localhost'); write a host in target that the certificate"),
        ("expired", True, "certificate has expired); renew it"),
    ],
)
def test_certificate_that_cannot_be_trusted(
    gateway, tmp_path, origin, authority, monkeypatch, caplog, name, trusted, problem
):
    if name == "expired":
        monkeypatch.setattr(authority_module, "LEAF_LIFETIME", authority_module.BACKDATE / 2)
        name = "localhost"
        authority = Authority(tmp_path / "late")
    keys = {"target_ca_file": str(authority.ca_file)} if trusted else {}
    origin.serve(lambda wire: with_tls(wire, authority, name))
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}", **keys):
        code, line = refused(gateway, caplog)
    assert code == "target-untrusted"
    assert line.startswith(
        f"{APP}: target https://localhost:{origin.port}: its certificate is not to be trusted ("
    )
    assert problem in line


def test_certificate_that_cannot_be_trusted_resets_a_tcp_visit(
    gateway, tmp_path, origin, authority
):
    origin.serve(lambda wire: with_tls(wire, authority).read())
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}", "tcp"):
        with gateway.dial(RAW) as visitor:
            with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
                visitor.send(b"secret")
                visitor.read()


def test_target_without_tls_is_not_spoken_to_in_plain(gateway, tmp_path, origin, caplog):
    came = []
    origin.serve(lambda wire: [came.append(wire.read()), wire.send(answer())])
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}"):
        code, line = refused(gateway, caplog)
    assert code == "target-unreachable"
    assert line.endswith(": it speaks HTTP without TLS; write the target without https://")
    assert came[0][:1] == b"\x16" and b"GET" not in came[0]  # a ClientHello


def test_target_that_knows_no_such_name_is_told_so(gateway, tmp_path, origin, caplog):
    unrecognized_name = bytes((21, 3, 3, 0, 2, 2, ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME))
    origin.serve(lambda wire: [wire.read(), wire.send(unrecognized_name)])
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}"):
        code, line = refused(gateway, caplog)
    assert code == "target-unreachable"
    assert ": it has no certificate for the name localhost; write a host in target that" in line


def test_target_that_closes_in_the_handshake(gateway, tmp_path, origin, caplog):
    origin.serve(lambda wire: wire.read())
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}"):
        assert refused(gateway, caplog)[0] == "target-unreachable"


def test_handshake_that_the_target_does_not_answer(gateway, tmp_path, origin, impatient, caplog):
    origin.serve(lambda wire: wire.read_to_end())
    with serving(gateway, tmp_path, f"https://localhost:{origin.port}"):
        code, line = refused(gateway, caplog)
    assert code == "target-timed-out"
    assert line == f"{APP}: target https://localhost:{origin.port}: no answer in 0.5 s"


def test_ca_file_of_a_target_without_certificates_ends_the_agent_at_its_start(tmp_path, gateway):
    path = tmp_path / "ca.pem"
    path.write_text("none\n")
    with pytest.raises(CannotTrust, match=r"^target_ca_file .*/ca\.pem: .*, expected certificates"):
        with serving(gateway, tmp_path, "https://localhost:1", target_ca_file=str(path)):
            pass


def test_tunnels_that_trust_the_same_share_a_context(monkeypatch, tmp_path, gateway, authority):
    made = []
    make = plan.tls_context
    monkeypatch.setattr(plan, "tls_context",
                        lambda *arguments: made.append(arguments) or make(*arguments))  # fmt: skip
    ca_file = str(authority.ca_file)
    keys = [{}, {}, {"target_ca_file": ca_file}, {"target_ca_file": ca_file}]
    tunnels = [
        {"hostname": f"app{number}.localhost", "target": "https://localhost:1", **more}
        for number, more in enumerate(keys)
    ]
    with agent_here(gateway, tmp_path, ready=False, tunnels=tunnels):
        assert len(made) == 3  # one for the gateway, two for the targets


# Unix sockets ------------------------------------------------------------------------------------


@pytest.fixture
def unix(tmp_path):
    """A listening unix socket that takes one connection that nobody has accepted, and its path."""
    path = str(tmp_path / "target.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        listening.settimeout(TIMEOUT)
        yield listening, path


def test_unix_socket_in_http_mode(gateway, tmp_path, unix):
    listening, path = unix
    with serving(gateway, tmp_path, f"unix:{path}"), gateway.dial(APP) as visitor:
        visitor.send(request())
        with listening.accept()[0] as target:
            assert target.recv(4) == b"GET "
            target.sendall(answer(b"from a socket"))
            assert visitor.read_message()[1] == b"from a socket"


def test_unix_socket_in_tcp_mode_passes_half_close_on(gateway, tmp_path, unix):
    listening, path = unix
    with serving(gateway, tmp_path, f"unix:{path}", "tcp"), gateway.dial(RAW) as visitor:
        visitor.send(b"question")
        visitor.finish()
        with listening.accept()[0] as target:
            with target.makefile("rb") as incoming:
                assert incoming.read() == b"question"
            target.sendall(b"answer")
            target.shutdown(socket.SHUT_WR)
            assert visitor.read_to_end() == b"answer"


def test_unix_socket_that_is_not_there(gateway, tmp_path, caplog):
    path = tmp_path / "none.sock"
    with serving(gateway, tmp_path, f"unix:{path}"):
        code, line = refused(gateway, caplog)
    assert code == "target-unreachable"
    assert line == f"{APP}: target unix:{path}: No such file or directory"


def test_unix_socket_with_a_full_backlog_is_waited_for(gateway, tmp_path, unix):
    """A non-blocking dial would fail at once, though the target is only busy."""
    listening, path = unix
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(path)
        with serving(gateway, tmp_path, f"unix:{path}"), gateway.dial(APP) as visitor:
            visitor.send(request())
            visitor.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                visitor.read()
            visitor.sock.settimeout(TIMEOUT)
            listening.accept()[0].close()
            with listening.accept()[0] as target:
                assert target.recv(4) == b"GET "
                target.sendall(answer())
                assert status_of(visitor.read_head()) == 200


def test_unix_socket_whose_backlog_stays_full(gateway, tmp_path, unix, caplog, monkeypatch):
    monkeypatch.setattr(target_module, "DIAL_TIMEOUT", 1)
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(unix[1])
        with serving(gateway, tmp_path, f"unix:{unix[1]}"):
            code, line = refused(gateway, caplog)
    assert code == "target-timed-out" and line.endswith(": no answer in 1 s")


# Dialling ----------------------------------------------------------------------------------------


def receive_buffer(name, sock):
    """The size that the target's connection gets if ``sock`` calls itself ``name``."""
    near = types.SimpleNamespace(
        getsockname=lambda: (name, 0), getpeername=sock.getpeername, setsockopt=sock.setsockopt
    )
    target_module._limit_if_near(near)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def test_a_target_of_the_same_machine_gets_a_small_receive_buffer(monkeypatch):
    """For another one, the kernel's own grows with the line."""
    monkeypatch.setattr(target_module, "NEAR_BUFFER", 10_000)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with socket.create_connection(listening.getsockname()) as sock:
            before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            assert receive_buffer("192.0.2.1", sock) == before
            assert receive_buffer("127.0.0.1", sock) in (10_000, 20_000)  # Linux doubles it
        port = listening.getsockname()[1]
        target = target_module.Target("localhost", port)
        with contextlib.closing(target_module.dial(target, None)) as dialled:
            size = dialled._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            assert size in (10_000, 20_000)


def test_refused_connection_is_a_502_at_once(gateway, tmp_path, caplog, monkeypatch):
    # A wait for this timeout would fail the test.
    monkeypatch.setattr(target_module, "DIAL_TIMEOUT", 10 * TIMEOUT)
    with reserved_port() as port, serving(gateway, tmp_path, f"http://localhost:{port}"):
        code, line = refused(gateway, caplog)
        assert code == "target-unreachable"
        problem = "Connection refused; does a program listen there?"
        assert line == f"{APP}: target localhost:{port}: {problem}"


def test_target_that_does_not_answer_a_syn(gateway, tmp_path, impatient, caplog):
    with deaf_port() as port, serving(gateway, tmp_path, f"127.0.0.1:{port}"):
        code, line = refused(gateway, caplog)
    assert code == "target-timed-out" and line.endswith(": no answer in 0.5 s")


def test_deaf_address_leaves_time_for_the_next_one(
    gateway, tmp_path, origin, impatient, monkeypatch
):
    with deaf_port() as deaf:
        addresses = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))
            for port in (deaf, origin.port)
        ]
        resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **kinds: (
            addresses if host == b"two.example" else resolve(host, *rest, **kinds)))  # fmt: skip
        origin.serve(lambda wire: [wire.read_head(), wire.send(answer())])
        with serving(gateway, tmp_path, "two.example:80"):
            assert gateway.get(APP) == (200, b"ok")


def test_name_that_does_not_resolve(gateway, tmp_path, caplog, monkeypatch):
    resolve = socket.getaddrinfo

    def without_that_name(host, *rest, **kinds):
        if host == b"none.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *rest, **kinds)

    monkeypatch.setattr(socket, "getaddrinfo", without_that_name)
    with serving(gateway, tmp_path, "none.example:80"):
        code, line = refused(gateway, caplog)
    assert code == "target-unreachable"
    assert line == f"{APP}: target none.example:80: Name or service not known"


# host_header -------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["intranet", "intranet.example:8080", "[::1]:80", "192.0.2.1"])
def test_target_gets_the_host_that_it_insists_on(gateway, tmp_path, origin, host):
    with serving(gateway, tmp_path, f"127.0.0.1:{origin.port}", host_header=host):
        with gateway.dial(APP) as visitor:
            visitor.send(request("GET", "/", "X-Forwarded-Host: liar"))
            fields = fields_of(origin.accept().read_head())
    hosts = [line for line in fields if line.startswith(("host:", "x-forwarded-host:"))]
    assert hosts == [f"host: {host}", f"x-forwarded-host: {APP}"]


def test_visitor_of_http_1_0_without_host_gets_there_too(gateway, tmp_path, origin):
    with serving(gateway, tmp_path, f"127.0.0.1:{origin.port}", host_header="intranet"):
        with gateway.dial(APP) as visitor:
            visitor.send(b"GET / HTTP/1.0\r\n\r\n")
            fields = fields_of(origin.accept().read_head())
    assert [line for line in fields if line.startswith("host:")] == ["host: intranet"]


def test_hostnames_without_host_header_keep_the_visitors(gateway, tmp_path, origin):
    target = f"127.0.0.1:{origin.port}"
    tunnels = [
        {"hostname": APP, "target": target, "host_header": "intranet"},
        {"hostname": OTHER, "target": target},
    ]
    with agent_here(gateway, tmp_path, http={APP: 0, OTHER: 0}, tunnels=tunnels):
        for hostname, host in ((APP, "intranet"), (OTHER, OTHER)):
            with gateway.dial(hostname) as visitor:
                visitor.send(request(host=hostname))
                assert f"host: {host}" in fields_of(origin.accept().read_head())


def altering(monkeypatch, **changes):
    """From now on agents send ``changes`` in their register message."""

    def encode(message):
        altered = isinstance(message, Register)
        return encode_message(message._replace(**changes) if altered else message)

    monkeypatch.setattr(link_module, "encode_message", encode)


@pytest.mark.parametrize("host", ["", "http://intranet", "intranet\r\nX-Admin: yes", "a:99999"])
def test_gateway_refuses_a_host_that_is_none(gateway, tmp_path, monkeypatch, caplog, host):
    altering(monkeypatch, host_headers={APP: host})
    tunnel = {"hostname": APP, "target": "127.0.0.1:1", "host_header": "intranet"}
    with agent_here(gateway, tmp_path, ready=False, tunnels=[tunnel]):
        wait_until(lambda: f"the gateway refused: invalid host_header of {APP}: {host!r}" in
                   caplog.text)  # fmt: skip
        assert gateway.inner.tunnels.registry.lookup(APP) is None


def test_gateway_does_nothing_that_it_was_not_asked_for_by_a_feature(
    gateway, tmp_path, monkeypatch
):
    altering(monkeypatch, features=())
    with serving(gateway, tmp_path, "127.0.0.1:1", host_header="intranet"):
        assert gateway.inner.tunnels.registry.lookup(APP).host_header is None


def test_go_gateway_does_not_know_host_header_so_the_tunnel_is_not_served(
    gopeer, cache, tmp_path, caplog
):
    with Origin() as origin, go_gateway(gopeer, cache) as gateway:
        target = f"127.0.0.1:{origin.port}"
        tunnels = [
            {"hostname": APP, "target": target, "host_header": "intranet"},
            {"hostname": OTHER, "target": target},
        ]
        with agent_here(gateway, tmp_path, http={APP: 0, OTHER: 0}, tunnels=tunnels):
            for _ in range(2):
                with gateway.visitor(APP) as visitor:
                    visitor.request("GET", "/")
                    response = visitor.getresponse()
                    assert response.status == 502
                    assert response.getheader("X-Gotunnel-Error") == "target-misconfigured"
            assert origin.was_left_alone()
            origin.serve(lambda wire: [wire.read_head(), wire.send(answer())])
            assert gateway.get(OTHER) == (200, b"ok")
    lines = [record.getMessage() for record in caplog.records
             if record.levelno >= logging.WARNING and APP in record.getMessage()]  # fmt: skip
    assert lines == [
        f"{APP}: not served: this gateway does not know host_header; update the gateway, or "
        "remove the keys that need it"
    ]


class Stuck:
    """A stream whose gateway has sent FIN, and reads no more of the answer."""

    def __init__(self):
        self.was_reset = threading.Event()
        self.on_death = lambda callback: None
        self.finish = self.close = lambda: None

    def read(self):
        return b""

    def write(self, data):
        assert self.was_reset.wait(TIMEOUT)
        raise StreamReset("reset")

    def reset(self):
        self.was_reset.set()


class Generous:
    """A target whose answer never ends."""

    def __init__(self):
        self.stop = self.reset = self.finish = self.stop_reading = lambda: None

    def read(self):
        return b"answer"


def test_exchange_waits_for_no_gateway_that_has_ended_and_does_not_take_the_answer(monkeypatch):
    monkeypatch.setattr(target_module, "ANSWER_TIMEOUT", 0.05)
    stream = Stuck()
    target = Generous()
    target_module.exchange(stream, target, target)
    assert stream.was_reset.is_set()


def test_page_that_the_gateway_takes_in_part_is_reset():
    """A gateway without the feature REFUSALS passes the page on: a part must not look whole."""
    done = []

    class Stuck:
        def write(self, data, timeout):
            raise TimeoutError

        def reset(self):
            done.append("reset")

        def close(self):
            done.append("close")

    tunnel = types.SimpleNamespace(mode="http")
    refusal = types.SimpleNamespace(text="No.", word="target-unreachable")
    target_module.refuse(Stuck(), target_module.Route(tunnel), refusal)
    assert done == ["reset", "close"]


def test_targets_are_reset_without_the_lock_that_guards_them():
    targets, free = target_module.Targets(), []

    class Target:
        def reset(self):
            free.append(targets._lock.acquire(blocking=False))
            targets._lock.release()

        def close(self):
            """Its connection is none."""

    with targets.hold(Target()):
        targets.reset()
        with targets.hold(Target()):  # held after the reset
            pass
    assert free == [True, True]
