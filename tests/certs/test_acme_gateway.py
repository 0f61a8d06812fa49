"""Certificates from a CA, end to end: a gateway, its agent, and Pebble or the fake CA."""

import contextlib
import hashlib
import ipaddress
import json
import logging
import random
import socket
import ssl
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from fake_ca import DAY, SILENCE, FakeCa, Mint, problem
from hand_made import registered
from pebble import pebble
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    TIMEOUT,
    TUNNEL_HOST,
    Wire,
    agent_here,
    answer,
    at_length,
    ca_of,
    dial_tls,
    fields_of,
    gateway_here,
    request,
    reserved_port,
    status_of,
    tls_context,
    wait_until,
)

from gotunnel_agent.registering import make_token
from gotunnel_server import gateway as gateway_module
from gotunnel_server.certs import acme, keeper, look_up, schedule
from gotunnel_server.certs.acme_errors import HOST, LATER, CaError
from gotunnel_server.certs.challenges import PATH, Challenges
from gotunnel_server.certs.local_ca import Authority, CertificateError
from gotunnel_server.certs.state import FAILED, READY, WAITING, State
from gotunnel_server.net.client_hello import ACME_TLS
from gotunnel_server.net.dns import NoAnswer
from gotunnel_server.net.inherited import NOTHING, Inherited
from gotunnel_server.visitors import arrival

TOKEN = "LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0"
OTHER = "other.localhost"
# A fatal alert (2) as a record of TLS 1.2, which is also how TLS 1.3 writes it (RFC 8446 §6).
UNRECOGNIZED_NAME = bytes([21, 3, 3, 0, 2, 2, 112])


@contextlib.contextmanager
def house(tmp_path, *, http=True, lifetime=None, seen_at=None, **changes):
    """A gateway that orders at a Pebble of its own. Pebble validates HTTP-01 at the gateway's port,
    or at ``seen_at``."""
    with reserved_port() as plain, reserved_port() as public, \
            pebble(tmp_path / "pebble", seen_at or plain, public, lifetime=lifetime) \
            as ca:  # fmt: skip
        changes = {
            "GATEWAY_PORT": str(public), "HTTP_PORT": str(plain) if http else "0", **changes
        }  # fmt: skip
        with ordering(tmp_path, ca.directory, ca.ca_file, ca.root(), **changes) as gateway:
            gateway.ca = ca
            yield gateway


@contextlib.contextmanager
def fake_house(tmp_path, **changes):
    """The same with a fake CA, which validates nothing. It speaks TLS, as a gateway requires."""
    authority = Authority(tmp_path / "authority")
    with FakeCa(time.time) as ca:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("localhost"))
        ca._server.socket = context.wrap_socket(
            ca._server.socket, server_side=True, do_handshake_on_connect=False
        )
        ca.url = ca.url.replace("http://127.0.0.1", "https://localhost")
        with ordering(tmp_path, ca.directory, authority.ca_file, pem_of(ca.mint), **changes) \
                as gateway:  # fmt: skip
            gateway.context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # its CA is a plain one
            gateway.ca = ca
            yield gateway


@contextlib.contextmanager
def ordering(tmp_path, directory, ca_file, root, inherited=NOTHING, **changes):
    """A gateway that orders; ``root`` is what its visitors trust. TUNNEL_HOST, which agents dial
    and no CA would sign, has a certificate of the operator's."""
    own = tmp_path / "own"
    own.mkdir(exist_ok=True)
    authority = Authority(tmp_path / "authority")
    for file in authority.issue(TUNNEL_HOST):
        (own / file.name).write_bytes(file.read_bytes())
    cache = tmp_path / "cache"
    trusted = ca_of(cache)
    trusted.parent.mkdir(parents=True, exist_ok=True)
    trusted.write_text(root + authority.ca_file.read_text())
    environment = {
        "ACME_ENV": "production", "ACME_DIRECTORY": directory, "ACME_CA_FILE": str(ca_file),
        "CERT_DIR": str(own), "HTTP_PORT": "0", **changes,
    }  # fmt: skip
    # A loaded machine may take longer for an order than a visitor has patience.
    with mock.patch.object(arrival, "CERTIFICATE_TIMEOUT", TIMEOUT), \
            gateway_here(cache, inherited=inherited, **environment) as gateway:  # fmt: skip
        yield gateway


def pem_of(mint):
    return mint.certificate.public_bytes(serialization.Encoding.PEM).decode()


def serve_pages(origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))


def orders(ca):
    """The hostnames that were ordered, in their order."""
    return [order["identifiers"][0]["value"] for order in ca.payloads("new-order")]


def serial_at(gateway, hostname):
    """The serial number of the certificate that a new visitor gets."""
    with gateway.dial(hostname) as visitor:
        return serial_of(visitor)


def serial_of(wire):
    return x509.load_der_x509_certificate(wire.sock.getpeercert(binary_form=True)).serial_number


@pytest.mark.parametrize("http", [True, False], ids=["http-01", "tls-alpn-01"])
def test_new_hostname_is_served_within_seconds(tmp_path, origin, caplog, http):
    caplog.set_level(logging.INFO)
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with house(tmp_path, http=http) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}, tcp={RAW: origin.port}):
            # The first visitor comes before the certificate, and waits for it.
            assert gateway.get(APP) == (200, b"page")
            with gateway.dial(GATEWAY_HOST), gateway.dial(RAW):
                pass
            kind = "http-01" if http else "tls-alpn-01"
            wait_until(lambda: f"{APP}: certificate: ready" in caplog.text)
            assert f", by {kind}" in caplog.text


def test_restarted_gateway_serves_what_it_has_and_orders_nothing(tmp_path, origin, caplog):
    """The CA is down by then, too."""
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as visitor:
                serial = serial_of(visitor)
        with gateway.dial(GATEWAY_HOST):
            pass  # its certificate, which was ordered too, is there as well
        directory, own = gateway.ca.directory, tmp_path / "own"
    caplog.clear()
    environment = {"ACME_ENV": "production", "ACME_DIRECTORY": directory, "HTTP_PORT": "0"}
    with gateway_here(tmp_path / "cache", CERT_DIR=str(own), **environment) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as visitor:
                assert serial_of(visitor) == serial
            assert gateway.get(APP) == (200, b"page")
    assert "no certificate" not in caplog.text


@contextlib.contextmanager
def absent_ca():
    """The directory of a CA that does not answer."""
    with reserved_port() as nobody:
        yield f"https://localhost:{nobody}/d"


def test_ca_that_is_away_is_told_to_the_agent_and_stops_nobody_else(tmp_path, origin, caplog):
    caplog.set_level(logging.INFO)
    with absent_ca() as directory, house(tmp_path, ACME_DIRECTORY=directory) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: f"{APP}: certificate: failed: {directory}" in caplog.text)
            with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
                gateway.dial(APP)
            with gateway.dial(TUNNEL_HOST):
                pass


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (OSError("Name or service not known"), "certificate: failed: DNS: app.example.com does not "
         "resolve (Name or service not known)"),
        (NoAnswer("Temporary failure in name resolution"), "certificate: failed: DNS: no resolver "
         "answers for app.example.com (Temporary failure in name resolution)"),
        (["203.0.113.7"], "app.example.com leads to 203.0.113.7, but this machine has "),
    ],
)  # fmt: skip
def test_a_look_at_the_name_comes_before_the_first_order(
    tmp_path, origin, caplog, monkeypatch, found, words
):
    def resolve(hostname):
        assert hostname == "app.example.com"
        if isinstance(found, OSError):
            raise found
        return found

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(look_up, "resolve", resolve)
    with house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={"app.example.com": origin.port}):
            wait_until(lambda: words in caplog.text)
            if found == ["203.0.113.7"]:  # only a warning: the CA decides, and this one accepts
                wait_until(lambda: "app.example.com: certificate: ready" in caplog.text)


def test_the_last_word_on_a_certificate_is_the_latest(tmp_path, origin, caplog):
    """Orders that fail while the agent's other hostnames are still being registered."""
    caplog.set_level(logging.INFO)
    names = [f"n{number}.example.com" for number in range(20)]
    with absent_ca() as directory, house(tmp_path, ACME_DIRECTORY=directory) as gateway:
        with agent_here(gateway, tmp_path, http=dict.fromkeys(names, origin.port)):
            for name in names:
                wait_until(lambda: f"{name}: certificate: failed" in caplog.text)  # noqa: B023
    for name in names:
        words = [record.message for record in caplog.records
                 if record.message.startswith(f"{name}: certificate: ")]  # fmt: skip
        assert "failed" in words[-1]


LINK = f"https://portal.letsencrypt.org/sfe/v1/unpause?jwt={'eyJ' * 300}"


def test_a_paused_hostname_is_told_its_link_and_holds_up_nobody_else(tmp_path, origin, caplog):
    """The words are Let's Encrypt's; they stopped all orders for an hour."""
    caplog.set_level(logging.INFO)
    with fake_house(tmp_path) as gateway:
        wait_until(lambda: gateway.inner.keeper.state(GATEWAY_HOST).name == READY)
        gateway.ca.script["new-order"] = [problem(429, "rateLimited",
            f"Your account is temporarily prevented from requesting certificates for {APP} and "
            f"possibly others. Please visit: {LINK}")]  # fmt: skip
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: f"{APP}: certificate: failed: " in caplog.text)
            told = [record.getMessage() for record in caplog.records
                    if record.getMessage().startswith(f"{APP}: certificate: failed")]  # fmt: skip
            assert all(LINK in line for line in told)
            assert f"{APP}: no certificate, next attempt in 3600 s: " in caplog.text
        with agent_here(gateway, tmp_path, http={OTHER: origin.port}):
            wait_until(lambda: f"{OTHER}: certificate: ready" in caplog.text)


def test_a_credential_of_one_hostname_cannot_use_up_what_its_domain_gets(tmp_path):
    """It registers one name after the other, at a gateway that orders at Pebble."""
    file, secret = tmp_path / "agents.yaml", "an-agent's-own-secret-of-32-bytes"
    entry = {"secret": secret, "hosts": "*.dev.localhost", "limits": {"hostnames": 1}}
    file.write_text(json.dumps({"office": entry}))
    file.chmod(0o600)
    names = [f"n{number}.dev.localhost" for number in range(12)]
    with house(tmp_path, AGENTS_FILE=str(file)) as gateway:
        state = gateway.inner.keeper.state
        for name in names:
            token = make_token(secret, "office", 3600)
            with registered(gateway, name, token=token):
                wait_until(lambda: state(name).name != WAITING)  # noqa: B023
        assert [state(name).name for name in names] == [READY] * 6 + [FAILED] * 6
        assert all("in an hour (6)" in state(name).reason for name in names[6:])
        with registered(gateway, OTHER):  # another agent's
            wait_until(lambda: state(OTHER).name == READY)


def test_http_01_that_nobody_sees_costs_the_first_hostname_a_minute_and_no_other(
    tmp_path, origin, caplog, monkeypatch
):
    monkeypatch.setattr(schedule, "BACKOFF", (0.5,))
    caplog.set_level(logging.INFO)
    with reserved_port() as nobodys, house(tmp_path, seen_at=nobodys) as gateway:
        wait_until(lambda: gateway.inner.keeper.state(GATEWAY_HOST).name == READY)
        with agent_here(gateway, tmp_path, http={APP: origin.port, OTHER: origin.port}):
            for name in (APP, OTHER):
                wait_until(lambda: f"{name}: certificate: ready" in caplog.text)  # noqa: B023
    failures = [record.getMessage() for record in caplog.records
                if "no certificate, next attempt" in record.getMessage()]  # fmt: skip
    assert len(failures) == 1 and failures[0].startswith(f"{GATEWAY_HOST}: ")
    assert caplog.text.count("by tls-alpn-01") == 3


def test_a_new_certificate_comes_when_the_operator_asks(tmp_path, origin, monkeypatch):
    monkeypatch.setattr(gateway_module, "RELOAD", 0.05)
    with house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as visitor:
                first = serial_of(visitor)
            gateway.inner.keeper._ordered._store.ask_renewal(APP)

            def is_new():
                with gateway.dial(APP) as visitor:
                    return serial_of(visitor) != first

            wait_until(is_new)


@pytest.mark.parametrize(
    ("found", "kind", "again"),
    [
        (OSError("no such name"), HOST, None),
        (NoAnswer("no resolver"), LATER, look_up.RESOLVE_AGAIN),
    ],
)
def test_whose_fault_it_is_that_a_name_does_not_resolve(monkeypatch, found, kind, again):
    def resolve(hostname):
        raise found

    monkeypatch.setattr(look_up, "resolve", resolve)
    with pytest.raises(CaError) as caught:
        look_up.look_up("app.example.com")
    assert (caught.value.kind, caught.value.retry_after) == (kind, again)


def test_agents_of_the_common_secret_are_told_apart(tmp_path, origin, cache, monkeypatch):
    with gateway_here(cache) as gateway:
        ensured = []
        monkeypatch.setattr(gateway.inner.tunnels, "ensure_certificates",
                            lambda hostnames, agent, limits: ensured.append(agent))  # fmt: skip
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            [agent] = ensured
    assert int(ipaddress.ip_address("127.0.0.1")) in agent


def test_gateway_that_stops_lets_nobody_wait_for_a_certificate(tmp_path, origin):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a CA that says nothing
        directory = f"https://localhost:{silent.getsockname()[1]}/d"
        with house(tmp_path, ACME_DIRECTORY=directory, DRAIN_TIMEOUT="10") as gateway:
            visitors = gateway.inner._visitors
            with agent_here(gateway, tmp_path, http={APP: origin.port}):
                sock = socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)
                visitor = gateway.context.wrap_socket(
                    sock, server_hostname=APP, do_handshake_on_connect=False
                )
                visitor.setblocking(False)
                with pytest.raises(ssl.SSLWantReadError):
                    visitor.do_handshake()
                wait_until(lambda: [one for one in visitors._visitors if one.sni == APP])
            began = time.monotonic()
        assert time.monotonic() - began < 8  # less than the drain
        assert not visitors._visitors
        visitor.close()


def test_a_visitor_waits_until_its_certificate_is_served_and_not_only_there(tmp_path, monkeypatch):
    """In between a handshake would fail."""
    with house(tmp_path) as gateway:
        awaits, states = gateway.inner.keeper.pending, {}
        monkeypatch.setattr(gateway.inner.keeper._ordered.issuer.queue, "state", states.get)
        for name, expected in (WAITING, True), (READY, True), (FAILED, False):
            states[APP] = State(name, "", 0.0, None)
            assert awaits(APP) is expected
        assert awaits(OTHER) is False and awaits(None) is False
        states[TUNNEL_HOST] = State(WAITING, "", 0.0, None)
        assert awaits(TUNNEL_HOST) is False  # it has one


def test_nobody_causes_an_order_by_a_hello(tmp_path):
    with house(tmp_path) as gateway:
        with gateway.dial(GATEWAY_HOST):  # which has waited for it
            pass
        for number in range(20):
            with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
                gateway.dial(f"x{number}.example.com")
    known = {file.stem for file in (tmp_path / "cache").glob("*/certs/*")}
    assert known == {GATEWAY_HOST}


# A proof, while a CA validates it ----------------------------------------------------------------


def test_ca_finds_the_file_and_nothing_is_left_of_it(tmp_path, origin, monkeypatch):
    real, asked = Challenges.body, []

    def body(self, hostname, path):
        found = real(self, hostname, path)
        asked.append((hostname, path, found is not None))
        return found

    monkeypatch.setattr(Challenges, "body", body)
    with house(tmp_path) as gateway:
        began = time.monotonic()
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP):  # which has waited for it
                pass
            assert time.monotonic() - began < 5
            found = [(path, there) for hostname, path, there in asked if hostname == APP]
            assert len(found) == 3  # Pebble validates three times
            assert len(set(found)) == 1
            path, there = found[0]
            assert there
            head, _ = ask_plain(gateway, "GET", path, APP)
            assert status_of(head) == 404
    [file] = (tmp_path / "cache").glob(f"*/certs/{APP}.pem")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["http", "alpn"])
def test_the_proof_of_a_gateway_that_hands_over_is_found_at_its_successor(
    tmp_path, origin, monkeypatch, kind
):
    """The old gateway listens no more when the CA looks, but its order is still at work."""
    real, published, go_on = getattr(Challenges, kind), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def publish(self, hostname, *proof):
        with real(self, hostname, *proof):
            if hostname == APP:
                published.set()
                go_on.wait(TIMEOUT)
            yield

    monkeypatch.setattr(Challenges, kind, publish)
    serve_pages(origin)
    with contextlib.ExitStack() as stack:
        plain, public = (stack.enter_context(reserved_port()) for _ in range(2))
        ca = stack.enter_context(pebble(tmp_path / "pebble", plain, public))
        stack.callback(go_on.set)
        place = (tmp_path, ca.directory, ca.ca_file, ca.root())
        changes = {"GATEWAY_PORT": str(public), "HTTP_PORT": str(plain if kind == "http" else 0)}
        old = stack.enter_context(ordering(*place, **changes))
        stack.enter_context(agent_here(old, tmp_path, http={APP: origin.port}))
        assert published.wait(TIMEOUT)
        shared = Inherited(old.inner.listeners.shared())
        new = stack.enter_context(ordering(*place, inherited=shared, **changes))
        new.inner.inherit(old.inner.estate())
        old.inner.stop_accepting()
        go_on.set()
        issuer = old.inner.keeper._ordered.issuer
        wait_until(lambda: issuer.queue.state(APP).name is READY)
        old.inner.stop()  # so the agent comes to the new one, which finds the certificate
        new.wait_for_routes(APP)
        assert new.get(APP) == (200, b"page")
        assert len(list((tmp_path / "cache").glob(f"*/certs/{APP}.pem"))) == 1


def test_visitor_during_a_proof_gets_the_previous_certificate(tmp_path, origin, monkeypatch):
    real, asked = Challenges.context, []
    renewing, looked, go_on = threading.Event(), threading.Event(), threading.Event()

    def context(self, hostname):
        found = real(self, hostname)
        asked.append((hostname, found is not None))
        if renewing.is_set() and not looked.is_set():
            looked.set()
            go_on.wait(TIMEOUT)  # this blocks a step thread of the gateway; others must go on
        return found

    monkeypatch.setattr(Challenges, "context", context)
    with house(tmp_path, http=False) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            first = serial_at(gateway, APP)
            # Pebble validates three times, and requires acme-tls/1.
            assert [one for one in asked if one[0] == APP] == [(APP, True)] * 3
            renewing.set()
            assert gateway.inner.keeper._ordered.issuer.queue.retry_now(APP)
            assert looked.wait(TIMEOUT)
            assert serial_at(gateway, APP) == first
            go_on.set()
            wait_until(lambda: serial_at(gateway, APP) != first)
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                look_for_proof(gateway, APP)


def test_proof_is_for_who_asks_for_nothing_else_and_by_its_name(cache, tmp_path, origin):
    digest = hashlib.sha256(b"key authorization").digest()
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.inner._challenges.alpn(APP, digest):
                with look_for_proof(gateway, APP) as ca:
                    assert ca.sock.selected_alpn_protocol() == ACME_TLS
                    der = ca.sock.getpeercert(binary_form=True)
                    assert digest in der
                    began = time.monotonic()
                    assert ca.read_to_end() == b""  # closed, without a byte
                    assert time.monotonic() - began < 5  # HEADER_TIMEOUT is 10
                gateway.context.set_alpn_protocols([ACME_TLS, "http/1.1"])
                with gateway.dial(APP) as visitor:  # dial() has verified the certificate
                    assert visitor.sock.selected_alpn_protocol() == "http/1.1"
                with pytest.raises((ssl.SSLError, ConnectionResetError)):
                    look_for_proof(gateway, GATEWAY_HOST)
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                look_for_proof(gateway, APP)


def look_for_proof(gateway, hostname, port="public_port"):
    """A CA's connection for tls-alpn-01."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([ACME_TLS])
    sock = socket.create_connection(("127.0.0.1", getattr(gateway, port)), TIMEOUT)
    try:
        return Wire(context.wrap_socket(sock, server_hostname=hostname))
    except BaseException:
        sock.close()
        raise


@pytest.mark.parametrize("port", ["public_port", "tunnel_port"])
def test_who_asks_for_a_proof_that_is_not_there_gets_no_certificate(cache, port):
    with gateway_here(cache) as gateway:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            look_for_proof(gateway, GATEWAY_HOST, port)


@pytest.mark.parametrize(
    ("method", "host", "path", "status", "location"),
    [
        ("GET", APP, "/a?b=c", 301, f"https://{APP}:{{port}}/a?b=c"),
        ("GET", f"{APP}:80", "/", 301, f"https://{APP}:{{port}}/"),
        ("POST", GATEWAY_HOST, "/", 308, f"https://{GATEWAY_HOST}:{{port}}/"),
        ("GET", "elsewhere.example", "/", 502, None),
        ("OPTIONS", APP, "*", 308, f"https://{APP}:{{port}}"),
        ("GET", APP, PATH + "none", 404, None),
        ("GET", "elsewhere.example", PATH + "none", 404, None),
        ("GET", APP, PATH.rstrip("/"), 301, f"https://{APP}:{{port}}{PATH.rstrip('/')}"),
    ],
)  # fmt: skip
def test_plain_http_is_sent_on(cache, tmp_path, origin, method, host, path, status, location):
    with gateway_here(cache, HTTP_PORT="auto") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            head, _ = ask_plain(gateway, method, path, host)
        assert status_of(head) == status
        lines = [line for line in fields_of(head) if line.startswith("location: ")]
        expected = location and f"location: {location.format(port=gateway.public_port)}"
        assert lines == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("method", "target", "host", "status"),
    [
        ("GET", PATH + TOKEN, APP, 200),
        ("GET", PATH + TOKEN, f"{APP}:80", 200),
        ("GET", PATH + TOKEN, f"{APP.upper()}.", 200),
        ("GET", f"http://{APP}{PATH}{TOKEN}", APP, 200),
        ("GET", f"HTTP://{APP.upper()}:80{PATH}{TOKEN}", f"{APP}:80", 200),
        ("HEAD", PATH + TOKEN, APP, 200),
        ("POST", PATH + TOKEN, APP, 405),
        ("OPTIONS", PATH + TOKEN, APP, 405),
        ("GET", PATH + TOKEN, RAW, 404),
        ("GET", PATH + TOKEN, "elsewhere.example", 404),
        ("GET", f"http://{RAW}{PATH}{TOKEN}", RAW, 404),
        ("GET", f"http://{APP}{PATH}{TOKEN}", RAW, 400),
        ("GET", PATH + TOKEN, "a b", 400),
        ("GET", f"{PATH}../{TOKEN}", APP, 404),
        ("GET", f"{PATH}..%2f{TOKEN}", APP, 404),
        ("GET", f"{PATH}%4c{TOKEN[1:]}", APP, 404),
        ("GET", f"{PATH}{TOKEN}?x", APP, 404),
        ("GET", f"{PATH}{TOKEN}!", APP, 404),
        ("GET", PATH + "a" * 129, APP, 404),
        ("GET", PATH, APP, 404),
    ],
)
def test_file_is_for_its_hostname_and_no_target_answers(
    cache, tmp_path, origin, method, target, host, status
):
    with gateway_here(cache, HTTP_PORT="auto") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.inner._challenges.http(APP, TOKEN, b"proof"):
                head, body = ask_plain(gateway, method, target, host)
        assert status_of(head) == status
        fields = fields_of(head)
        assert not [line for line in fields if line.startswith("location:")]
        assert ("content-type: application/octet-stream" in fields) == (status == 200)
        assert ("allow: get, head" in fields) == (status == 405)
        assert (body == b"proof") == (status == 200 and method == "GET")
        assert origin.was_left_alone()


def ask_plain(gateway, method, target, host):
    """Head and body of what the port for plain HTTP answers."""
    sock = socket.create_connection(("127.0.0.1", gateway.inner.http_port), TIMEOUT)
    with Wire(sock) as visitor:
        fields = f"Host: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        visitor.send(f"{method} {target} HTTP/1.1\r\n{fields}".encode())
        return visitor.read_head(), visitor.read_to_end()


# Hellos ------------------------------------------------------------------------------------------


def test_strangers_hellos_cost_nothing(tmp_path):
    def known():
        files = {file for file in (tmp_path / "cache").rglob("*")}
        inner = gateway.inner
        return (
            files,
            set(inner.keeper._ordered.issuer.queue._hosts),
            set(inner._certificates._issued),
        )

    dice = random.Random(8)
    with fake_house(tmp_path) as gateway:
        with gateway.dial(GATEWAY_HOST):  # which has waited for it
            pass
        wait_until(lambda: gateway.ca.count("dir") == 2)  # its order, and when to renew it
        wait_until(lambda: not gateway.inner.keeper._ordered.issuer._jobs)
        before, asked = known(), len(gateway.ca.asked)
        for _ in range(300):
            label = "".join(dice.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=12))
            with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
                gateway.dial(f"{label}.{dice.choice(['example.com', 'localhost'])}")
        assert answer_to_hello(gateway, "127.0.0.1") == UNRECOGNIZED_NAME
        gateway.context.check_hostname = False
        with gateway.dial(None) as visitor:  # no hostname: gets the certificate of GATEWAY_HOST
            assert ("DNS", GATEWAY_HOST) in visitor.sock.getpeercert()["subjectAltName"]
        assert (known(), len(gateway.ca.asked)) == (before, asked)


def answer_to_hello(gateway, address):
    """The answer to a ClientHello that names an address, which no library would write."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    name = "a" * len(address)
    visitor = gateway.context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        visitor.do_handshake()
    hello = outgoing.read()
    assert name.encode() in hello
    with Wire(socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)) as wire:
        wire.send(hello.replace(name.encode(), address.encode()))
        return wire.read()


def records(data, size):
    """A handshake's only record cut into records of so many bytes."""
    pieces = (data[at : at + size] for at in range(5, len(data), size))
    return b"".join(data[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize(
    ("cut", "step"),
    [(bytes, 1), (lambda hello: records(hello, 100), None), (lambda hello: records(hello, 1), None),
     (lambda hello: records(hello, 1), 1)],
    ids=["bytes", "records of 100", "records of 1", "records of 1 in bytes"],
)  # fmt: skip
def test_hello_may_come_in_any_pieces(cache, cut, step):
    with gateway_here(cache) as gateway:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        visitor = gateway.context.wrap_bio(incoming, outgoing, server_hostname=GATEWAY_HOST)
        with pytest.raises(ssl.SSLWantReadError):
            visitor.do_handshake()
        hello = cut(outgoing.read())
        with Wire(socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)) as wire:
            for at in range(0, len(hello), step or len(hello)):
                wire.send(hello[at : at + (step or len(hello))])
            while True:
                data = wire.read()
                assert data, "the gateway has closed the connection"
                incoming.write(data)
                try:
                    visitor.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    continue
        assert ("DNS", GATEWAY_HOST) in visitor.getpeercert()["subjectAltName"]


@pytest.mark.parametrize(
    ("first", "leaves"),
    [(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", True),
     (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", False),
     (b"", False),
     (b"\x16\x03\x01\x40\x00\x01\x00\x7f\xf0\x03\x03" + bytes(1000), False),
     (b"\x16\x03\x01\x00\x01\x01" * 100, False)],
    ids=["cut short and closed", "stalled", "silent", "of 32 KB", "in too many records"],
)  # fmt: skip
def test_hello_that_never_ends_is_dropped_in_time(cache, caplog, first, leaves):
    with gateway_here(cache, HEADER_TIMEOUT="1") as gateway:
        began, busy = time.monotonic(), time.process_time()
        with Wire(socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)) as wire:
            wire.send(first)
            if leaves:
                wire.finish()
            with contextlib.suppress(ConnectionResetError):
                wire.read_to_end()
        assert time.monotonic() - began < 4
        assert time.process_time() - busy < 0.3  # a busy loop would take the whole second
    assert "Traceback" not in caplog.text and "defect" not in caplog.text


def test_a_hostname_that_loses_its_given_certificate_gets_one_at_once(
    tmp_path, origin, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(gateway_module, "RELOAD", 0.02)
    serve_pages(origin)
    mint = Mint()
    own = tmp_path / "own"
    own.mkdir()

    def give(hostname, ends):
        key, chain = mint.pair(hostname, ends - DAY, DAY)
        (own / f"{hostname}.key").write_bytes(key)
        (own / f"{hostname}.crt").write_bytes(chain)
        return x509.load_pem_x509_certificates(chain)[0].serial_number

    given = give(APP, time.time() + DAY / 2)
    with fake_house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: f"{APP}: certificate: ready" in caplog.text)
            assert gateway.inner._certificates.is_given(APP) and APP not in orders(gateway.ca)
            order, may_order = gateway.inner.keeper._ordered.issuer._ca.order, threading.Event()

            def order_later(*words, **more):
                assert may_order.wait(TIMEOUT)
                return order(*words, **more)

            monkeypatch.setattr(gateway.inner.keeper._ordered.issuer._ca, "order", order_later)
            for file in own.glob(f"{APP}.*"):
                file.unlink()
            wait_until(lambda: f"{APP}: certificate: waiting" in caplog.text)
            may_order.set()
            wait_until(lambda: f"{APP}: certificate until" in caplog.text)
            assert gateway.get(APP) == (200, b"page")
            assert serial_at(gateway, APP) != given

            give(APP, time.time() + DAY / 2)  # nothing is ordered for what the operator has given
            wait_until(lambda: gateway.inner.keeper._ordered.issuer.queue.state(APP) is None)
        assert orders(gateway.ca).count(APP) == 1


def test_a_hostname_that_came_and_went_between_two_looks_is_dropped(tmp_path, origin, monkeypatch):
    serve_pages(origin)
    with fake_house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            assert gateway.get(APP) == (200, b"page")
        wait_until(lambda: not gateway.inner._registry.routes())
        issuer = gateway.inner.keeper._ordered.issuer
        kept = gateway.inner.keeper
        kept._served_before = {APP}
        kept._review()
        assert (
            APP in issuer.queue.hostnames() and APP not in kept._served_before
        )  # it may be back soon
        kept._review()
        assert issuer.queue.hostnames() == {GATEWAY_HOST}


def test_a_hostname_that_comes_at_the_moment_of_the_look_is_kept(tmp_path, origin, monkeypatch):
    serve_pages(origin)
    with fake_house(tmp_path) as gateway, contextlib.ExitStack() as stack:
        inner = gateway.inner
        want = inner.keeper.want

        def want_and_let_one_in(hostnames, agent=None):
            want(hostnames, agent)
            if agent is None and APP not in inner._registry.routes():
                routes = {APP: origin.port}
                stack.enter_context(agent_here(gateway, tmp_path, http=routes))

        monkeypatch.setattr(inner.keeper, "want", want_and_let_one_in)
        inner.keeper._review()
        assert APP in inner.keeper._ordered.issuer.queue.hostnames()


def test_a_given_certificate_that_has_run_out_is_no_reason_to_order_none(tmp_path, origin, caplog):
    caplog.set_level(logging.INFO)
    serve_pages(origin)
    own = tmp_path / "own"
    own.mkdir()
    key, chain = Mint().pair(APP, time.time() - 2 * DAY, DAY)
    (own / "app.key").write_bytes(key)
    (own / "app.crt").write_bytes(chain)
    with fake_house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: f"{APP}: certificate: ready" in caplog.text)
            assert gateway.get(APP) == (200, b"page")


# The life of a hostname --------------------------------------------------------------------------


def test_hostname_without_agent_keeps_its_certificate_but_is_not_renewed(
    tmp_path, origin, monkeypatch
):
    monkeypatch.setattr(gateway_module, "RELOAD", 0.02)
    monkeypatch.setattr(keeper, "KEEP", 0.02)
    serve_pages(origin)
    with fake_house(tmp_path) as gateway:
        issuer = gateway.inner.keeper._ordered.issuer
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            assert gateway.get(APP) == (200, b"page")
            with gateway.dial(APP) as visitor:
                serial = serial_of(visitor)
                visitor.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
                visitor.read_message()
                ticket = visitor.sock.session
        wait_until(lambda: issuer.queue.state(APP) is None)
        assert serial_at(gateway, APP) == serial
        assert gateway.get(APP)[0] == 502
        with dial_again(gateway, APP, ticket) as visitor:
            assert visitor.sock.session_reused
            visitor.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
            assert status_of(visitor.read_head()) == 502

        for part in (issuer, issuer.queue):
            monkeypatch.setattr(part, "_clock", lambda: time.time() + 80 * DAY)
        issuer.look()
        wait_until(lambda: orders(gateway.ca).count(GATEWAY_HOST) == 2)
        monkeypatch.undo()
        wait_until(lambda: not issuer._jobs)
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            assert gateway.get(APP) == (200, b"page")
            assert serial_at(gateway, APP) == serial
            assert issuer.queue.state(APP).is_ready
        assert orders(gateway.ca).count(APP) == 1


def dial_again(gateway, hostname, session):
    """A visitor with a session ticket of an earlier visit."""
    sock = socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)
    try:
        return Wire(gateway.context.wrap_socket(sock, server_hostname=hostname, session=session))
    except BaseException:
        sock.close()
        raise


def with_key_of_another(mint, pem):
    return mint.pair(APP)[0] + pem[pem.index(b"-----BEGIN CERT") :]


@pytest.mark.parametrize(
    ("harm", "is_ordered", "is_set_aside"),
    [
        (lambda mint, pem: pem[:-300], True, True),
        (lambda mint, pem: b"garbage", True, True),
        (with_key_of_another, True, True),
        (lambda mint, pem: b"".join(mint.pair(OTHER)), True, True),
        (lambda mint, pem: b"".join(mint.pair(APP, time.time() - 91 * DAY)), True, False),
        (lambda mint, pem: b"".join(mint.pair(APP, time.time() + 3600)), False, False),
    ],
    ids=["cut short", "garbage", "another's key", "another's", "expired", "not yet valid"],
)
def test_stored_certificate_that_is_no_use_is_ordered_anew(
    tmp_path, origin, caplog, harm, is_ordered, is_set_aside
):
    caplog.set_level(logging.INFO)
    serve_pages(origin)
    with fake_house(tmp_path) as gateway:
        mint, store = gateway.ca.mint, gateway.inner.keeper._ordered._store
        stored = store.save(APP, *mint.pair(APP, time.time() - DAY))
        file = tmp_path / "cache" / stored.key
        file.write_bytes(harm(mint, file.read_bytes()))
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            if is_ordered:
                wait_until(lambda: f"{APP}: certificate: ready" in caplog.text)
                assert orders(gateway.ca).count(APP) == 1
                assert gateway.get(APP) == (200, b"page")
                assert serial_at(gateway, APP) != stored.leaf.serial_number
            else:  # the CA's clock, or ours, is a little wrong: it is served all the same
                gateway.context.check_hostname = False
                gateway.context.verify_mode = ssl.CERT_NONE
                leaf = x509.load_pem_x509_certificates(file.read_bytes())[0]
                assert serial_at(gateway, APP) == leaf.serial_number
                assert APP not in orders(gateway.ca)
        assert file.with_name(file.name + ".bad").exists() == is_set_aside


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_session_is_resumed_across_a_renewal(tmp_path, origin, version):
    serve_pages(origin)
    with fake_house(tmp_path) as gateway:
        gateway.context.maximum_version = version
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as visitor:
                before = serial_of(visitor)
                visitor.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
                visitor.read_message()
                ticket = visitor.sock.session
            assert gateway.inner.keeper._ordered.issuer.queue.retry_now(APP)
            wait_until(lambda: serial_at(gateway, APP) != before)
            with dial_again(gateway, APP, ticket) as visitor:
                assert visitor.sock.session_reused
                visitor.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
                assert visitor.read_message()[1] == b"page"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_ticket_resumes_at_its_own_hostname_alone(cache, tmp_path, origin, version):
    serve_pages(origin)
    with gateway_here(cache) as gateway:
        gateway.context.maximum_version = version
        with agent_here(gateway, tmp_path, http={APP: origin.port, OTHER: origin.port}):
            with gateway.dial(APP) as visitor:
                visitor.send(request())
                visitor.read_message()
                ticket = visitor.sock.session
            for hostname, resumes in ((APP, True), (OTHER, False), (GATEWAY_HOST, False)):
                with dial_again(gateway, hostname, ticket) as visitor:
                    assert visitor.sock.session_reused == resumes
                    visitor.send(request(host=hostname))
                    assert visitor.read_message()[0].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("port", ["public_port", "tunnel_port"])
def test_ports_take_no_cbc(cache, port):
    hostname = {"public_port": GATEWAY_HOST, "tunnel_port": TUNNEL_HOST}[port]
    with gateway_here(cache) as gateway:
        for cipher, is_taken in (("ECDHE+AESGCM", True), ("ECDHE+AES+SHA256:ECDHE+SHA", False)):
            context = tls_context(gateway.ca_file)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(cipher)
            with contextlib.ExitStack() as stack:
                if not is_taken:
                    stack.enter_context(pytest.raises(ssl.SSLError, match="(?i)handshake.failure"))
                dial_tls(getattr(gateway, port), hostname, context).close()


def test_new_certificates_break_no_handshake_and_are_seen_at_once(cache, tmp_path):
    mint, leave = Mint(), threading.Event()
    with gateway_here(cache) as gateway:
        gateway.context = tls_context(None)
        gateway.context.load_verify_locations(cadata=pem_of(mint))
        gateway.context.verify_flags &= ~ssl.VERIFY_X509_STRICT

        def publish(number):
            key, chain = mint.pair(APP, time.time() - 3600 + number)
            file = tmp_path / f"{number}.pem"
            file.write_bytes(key + chain)
            gateway.inner._certificates.take(APP, file)
            return x509.load_pem_x509_certificates(chain)[0].serial_number

        def visit():
            count = 0
            while not leave.is_set():
                serial_at(gateway, APP)  # a handshake that fails is raised
                count += 1
            return count

        publish(0)
        with ThreadPoolExecutor(4) as pool:
            visits = [pool.submit(visit) for _ in range(4)]
            try:
                for number in range(1, 60):
                    assert publish(number) == serial_at(gateway, APP)
            finally:
                leave.set()
        assert all(one.result() > 10 for one in visits)


NOT_ACME = (200, {"Content-Type": "text/html"}, b"<html>It works!</html>")
ELSEWHERE = (302, {"Location": "/dir"}, b"")
BUSY = (503, {"Content-Type": "text/html", "Retry-After": "30"}, b"<html>back soon</html>")


@pytest.mark.parametrize(
    ("says", "words"),
    [(NOT_ACME, "It works!"), (ELSEWHERE, "redirects"), (BUSY, "503"), (SILENCE, "timed out")],
    ids=["garbage", "redirect", "busy", "silent"],
)
def test_ca_that_misbehaves_is_told_to_the_agent_and_stops_nobody_else(
    tmp_path, origin, caplog, monkeypatch, says, words
):
    caplog.set_level(logging.INFO)
    serve_pages(origin)
    visited, leave = threading.Event(), threading.Event()

    def visit():
        while not leave.is_set():
            assert gateway.get(OTHER) == (200, b"page")
            visited.set()

    with fake_house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={OTHER: origin.port}):
            assert gateway.get(OTHER) == (200, b"page")
        wait_until(lambda: not gateway.inner.keeper._ordered.issuer._jobs)
        monkeypatch.setattr(acme, "NETWORK_TIMEOUT", 0.5)
        gateway.ca.script["dir"] = [says] * 100
        routes = {OTHER: origin.port, APP: origin.port}
        with agent_here(gateway, tmp_path, http=routes), ThreadPoolExecutor(1) as pool:
            visits = pool.submit(visit)
            try:
                wait_until(lambda: f"{APP}: certificate: failed: {gateway.ca.url}" in caplog.text)
                visited.clear()
                assert visited.wait(TIMEOUT)
            finally:
                leave.set()
            visits.result()
            told = [record.getMessage() for record in caplog.records
                    if record.getMessage().startswith(f"{APP}: certificate: failed")]  # fmt: skip
            assert words in told[0]
            with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
                gateway.dial(APP)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "certificates"), [(10, 2), at_length(30, 5)])
def test_visitors_see_each_new_certificate_and_no_failure(tmp_path, origin, seconds, certificates):
    """Certificates of six seconds, and visits all the time; an expired one would be a failure."""
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    serials = set()
    with house(tmp_path, lifetime=6) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                with gateway.dial(APP) as visitor:
                    serials.add(serial_of(visitor))
    assert len(serials) >= certificates


def test_a_certificate_that_cannot_be_served_at_once_is_served_soon(
    tmp_path, origin, monkeypatch, caplog
):
    """As if the process had no descriptor left at that moment."""
    monkeypatch.setattr(gateway_module, "RELOAD", 0.02)
    serve_pages(origin)
    with fake_house(tmp_path) as gateway:
        take, failures = gateway.inner._certificates.take, []

        def fail_three_times(hostname, file):
            if hostname == APP and len(failures) < 3:
                failures.append(hostname)
                raise CertificateError(f"{file}: Too many open files")
            take(hostname, file)

        monkeypatch.setattr(gateway.inner._certificates, "take", fail_three_times)
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: len(failures) == 3)
            wait_until(lambda: gateway.inner._certificates.context(APP))
            assert gateway.get(APP) == (200, b"page")
    assert caplog.text.count("Too many open files") == 1


def test_a_disk_that_hangs_does_not_hold_up_the_end(cache, monkeypatch):
    hangs, go_on = threading.Event(), threading.Event()

    def hang():
        hangs.set()
        go_on.wait(TIMEOUT)

    monkeypatch.setattr(gateway_module, "RELOAD", 0.02)
    monkeypatch.setattr(gateway_module, "LAST_JOBS", 0.05)
    with gateway_here(cache) as gateway:
        [thread] = [one for one in threading.enumerate() if one.name == "keeper"]
        monkeypatch.setattr(gateway.inner._certificates, "reload", hang)
        assert hangs.wait(TIMEOUT)
    assert thread.is_alive()
    go_on.set()
    thread.join(TIMEOUT)
