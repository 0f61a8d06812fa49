"""Certificates from a real CA, end to end: a gateway, its agent, and Pebble."""

import contextlib
import logging
import socket
import ssl
import time

import pytest
from cryptography import x509
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
    ca_of,
    fields_of,
    gateway_here,
    reserved_port,
    status_of,
    wait_until,
)

from gotunnel_server import gateway as gateway_module
from gotunnel_server.authority import Authority

ACME_TLS = "acme-tls/1"


@contextlib.contextmanager
def house(tmp_path, *, http=True, lifetime=None, **changes):
    """A gateway that orders at a Pebble of its own. TUNNEL_HOST, which agents dial and no CA would
    sign, has a certificate of the operator's."""
    with contextlib.ExitStack() as ports:
        plain, public = (ports.enter_context(reserved_port()) for _ in range(2))
    own = tmp_path / "own"
    own.mkdir(exist_ok=True)
    authority = Authority(tmp_path / "authority")
    for file in authority.issue(TUNNEL_HOST):
        (own / file.name).write_bytes(file.read_bytes())
    cache = tmp_path / "cache"
    with pebble(tmp_path / "pebble", plain, public, lifetime=lifetime) as ca:
        trusted = ca_of(cache)
        trusted.parent.mkdir(parents=True, exist_ok=True)
        trusted.write_text(ca.root() + authority.ca_file.read_text())
        environment = {
            "ACME_ENV": "production", "ACME_DIRECTORY": ca.directory,
            "ACME_CA_FILE": str(ca.ca_file), "CERT_DIR": str(own),
            "GATEWAY_PORT": str(public), "HTTP_PORT": str(plain) if http else "0", **changes,
        }  # fmt: skip
        with gateway_here(cache, **environment) as gateway:
            gateway.ca = ca
            yield gateway


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
    """The CA is away by then, too."""
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as visitor:
                serial = serial_of(visitor)
        directory, own = gateway.ca.directory, tmp_path / "own"
    caplog.clear()
    environment = {"ACME_ENV": "production", "ACME_DIRECTORY": directory, "HTTP_PORT": "0"}
    with gateway_here(tmp_path / "cache", CERT_DIR=str(own), **environment) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as visitor:
                assert serial_of(visitor) == serial
            assert gateway.get(APP) == (200, b"page")
    assert "no certificate" not in caplog.text


def test_ca_that_is_away_is_told_to_the_agent_and_stops_nobody_else(tmp_path, origin, caplog):
    caplog.set_level(logging.INFO)
    with reserved_port() as nobody, house(tmp_path, ACME_DIRECTORY=f"https://localhost:{nobody}/d") \
            as gateway:  # fmt: skip
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: f"{APP}: certificate: failed: https://localhost:{nobody}" in caplog.text)
            with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
                gateway.dial(APP)
            with gateway.dial(TUNNEL_HOST):
                pass


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (OSError("Name or service not known"), "certificate: failed: DNS: app.example.com does not "
         "resolve (Name or service not known)"),
        (["203.0.113.7"], "app.example.com leads to 203.0.113.7, and this machine is "),
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
    monkeypatch.setattr(gateway_module, "resolve", resolve)
    with house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={"app.example.com": origin.port}):
            wait_until(lambda: words in caplog.text)
            if found == ["203.0.113.7"]:  # the CA has the last word, and says yes
                wait_until(lambda: "app.example.com: certificate: ready" in caplog.text)


def test_the_last_word_on_a_certificate_is_the_latest(tmp_path, origin, caplog):
    """Orders that fail while the agent's other hostnames are still being registered."""
    caplog.set_level(logging.INFO)
    names = [f"n{number}.example.com" for number in range(20)]
    with reserved_port() as nobody, house(tmp_path, ACME_DIRECTORY=f"https://localhost:{nobody}/d") \
            as gateway:  # fmt: skip
        with agent_here(gateway, tmp_path, http=dict.fromkeys(names, origin.port)):
            for name in names:
                wait_until(lambda: f"{name}: certificate: failed" in caplog.text)  # noqa: B023
    for name in names:
        words = [record.message for record in caplog.records
                 if record.message.startswith(f"{name}: certificate: ")]  # fmt: skip
        assert "failed" in words[-1]


def test_a_new_certificate_comes_when_the_operator_asks(tmp_path, origin, monkeypatch):
    monkeypatch.setattr(gateway_module, "RELOAD", 0.05)
    with house(tmp_path) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            with gateway.dial(APP) as visitor:
                first = serial_of(visitor)
            gateway.inner._store.ask_renewal(APP)

            def is_new():
                with gateway.dial(APP) as visitor:
                    return serial_of(visitor) != first

            wait_until(is_new)


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
                wait_until(lambda: [one for one in visitors._visitors if one._sni == APP])
            began = time.monotonic()
        assert time.monotonic() - began < 8  # less than the drain
        assert not visitors._visitors
        visitor.close()


def test_nobody_causes_an_order_by_a_hello(tmp_path):
    with house(tmp_path) as gateway:
        with gateway.dial(GATEWAY_HOST):  # which has waited for it
            pass
        for number in range(20):
            with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
                gateway.dial(f"x{number}.example.com")
    known = {file.stem for file in (tmp_path / "cache").glob("*/certs/*")}
    assert known == {GATEWAY_HOST}


@pytest.mark.parametrize("port", ["public_port", "tunnel_port"])
def test_who_asks_for_a_proof_that_is_not_there_gets_no_certificate(cache, port):
    with gateway_here(cache) as gateway:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([ACME_TLS])
        with socket.create_connection(("127.0.0.1", getattr(gateway, port)), TIMEOUT) as sock:
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                context.wrap_socket(sock, server_hostname=GATEWAY_HOST)


@pytest.mark.parametrize(
    ("method", "host", "path", "status", "location"),
    [
        ("GET", APP, "/a?b=c", 301, f"https://{APP}:{{port}}/a?b=c"),
        ("GET", f"{APP}:80", "/", 301, f"https://{APP}:{{port}}/"),
        ("POST", GATEWAY_HOST, "/", 308, f"https://{GATEWAY_HOST}:{{port}}/"),
        ("GET", "elsewhere.example", "/", 502, None),
        ("OPTIONS", APP, "*", 308, f"https://{APP}:{{port}}"),
        ("GET", APP, "/.well-known/acme-challenge/none", 301,
         f"https://{APP}:{{port}}/.well-known/acme-challenge/none"),
    ],
)  # fmt: skip
def test_plain_http_is_sent_on(cache, tmp_path, origin, method, host, path, status, location):
    with gateway_here(cache, HTTP_PORT="auto") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            sock = socket.create_connection(("127.0.0.1", gateway.inner.http_port), TIMEOUT)
            with Wire(sock) as visitor:
                visitor.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                head = visitor.read_head()
        assert status_of(head) == status
        lines = [line for line in fields_of(head) if line.startswith("location: ")]
        expected = location and f"location: {location.format(port=gateway.public_port)}"
        assert lines == ([expected] if expected else [])


@pytest.mark.slow
def test_visitors_see_each_new_certificate_and_no_failure(tmp_path, origin):
    """Certificates of six seconds, and visits all the time."""
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    serials = set()
    with house(tmp_path, lifetime=6) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:
                with gateway.dial(APP) as visitor:
                    serials.add(serial_of(visitor))
    assert len(serials) >= 3
