"""PostgreSQL's CancelRequest: the key is read where the session begins, and leads to its tunnel."""

import socket
import struct

import pytest
from support import (
    RAW,
    TIMEOUT,
    Wire,
    agent_here,
    dial_tls,
    gateway_here,
    tls_context,
    wait_until,
)

from gotunnel_server.visitors import postgres
from gotunnel_server.visitors.postgres import CancelKeys, Scanner

KEY = struct.pack("!II", 4711, 0xC0FFEE)
SSL_REQUEST = struct.pack("!II", 8, 80877103)
SECOND = "second.localhost"


def message(kind, body):
    return kind + struct.pack("!I", len(body) + 4) + body


def cancel_request(key):
    return struct.pack("!II", 8 + len(key), 80877102) + key


GREETING = (
    message(b"R", struct.pack("!I", 10) + b"SCRAM-SHA-256\0\0")
    + message(b"R", struct.pack("!I", 0))
    + message(b"S", b"server_version\x0015\0")
    + message(b"N", b"K" * 100)
)
READY = message(b"Z", b"I")


@pytest.mark.parametrize("key", [KEY, KEY[:4] + bytes(256)], ids=["3.0", "3.2"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_key_is_found_however_the_bytes_are_cut(key, size):
    data = GREETING + message(b"K", key) + READY
    scanner, found = Scanner(), []
    for at in range(0, len(data), size):
        if not scanner.over:
            found.append(scanner.feed(data[at : at + size]))
    assert [one for one in found if one is not None] == [key] and scanner.over


@pytest.mark.parametrize(
    "data",
    [
        READY, b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\0" * 5,
        message(b"K", b"short"), message(b"K", bytes(261)), b"S\0\0\0\0", b"R\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_a_target_that_says_anything_else_is_not_looked_at_any_more(data):
    for size in 1, len(data):
        scanner = Scanner()
        for at in range(0, len(data), size):
            if not scanner.over:
                assert scanner.feed(data[at : at + size]) is None
        assert scanner.over and not scanner._came


@pytest.mark.parametrize("size", [1000, 10_000])
def test_no_more_than_so_many_bytes_are_looked_at_and_kept(size):
    scanner, count = Scanner(), 0
    while not scanner.over:
        scanner.feed(message(b"S", bytes(size)))
        count += 1
        assert len(scanner._came) <= postgres.SCAN_LIMIT
    assert count <= postgres.SCAN_LIMIT / size + 1


def test_keys_are_bounded_and_the_first_that_has_one_keeps_it(monkeypatch):
    monkeypatch.setattr(postgres, "KEYS", 2)
    keys = CancelKeys()
    assert keys.add(b"one", "first") and not keys.add(b"one", "thief") and keys.add(b"two", "x")
    assert not keys.add(b"three", "y")
    assert keys.route(cancel_request(b"one")) == "first"
    keys.remove(b"one")
    assert keys.route(cancel_request(b"one")) is None and keys.add(b"three", "y")


@pytest.fixture
def gateway(cache, tmp_path, origin):
    """A gateway with two tcp hostnames, so that only the key can decide."""
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: origin.port, SECOND: 9}):
            yield gateway


def begin(gateway, origin, way):
    """Begin a session whose key the visitor has got; its visitor and its target."""
    context = tls_context(gateway.ca_file)
    if way == "direct":
        context.set_alpn_protocols(["postgresql"])
        visitor = dial_tls(gateway.public_port, RAW, context)
    else:
        visitor = Wire(dial_plain(gateway))
        visitor.send(SSL_REQUEST)
        assert visitor.read_exactly(1) == b"S"
        visitor = Wire(context.wrap_socket(visitor.sock, server_hostname=RAW))
    visitor.send(b"startup")
    target = origin.accept()
    target.read_exactly(7)
    target.send(GREETING + message(b"K", KEY) + READY)
    assert visitor.read_exactly(len(GREETING) + 13 + 6).endswith(READY)
    return visitor, target


def dial_plain(gateway):
    return socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT)


@pytest.mark.parametrize("way", ["SSLRequest", "direct"])
def test_a_cancel_request_without_tls_reaches_the_session_with_its_key(gateway, origin, way):
    visitor, target = begin(gateway, origin, way)
    with visitor, target:
        with Wire(dial_plain(gateway)) as second:
            for byte in cancel_request(KEY):
                second.send(bytes([byte]))
            with origin.accept() as cancelled:
                assert cancelled.read_exactly(16) == cancel_request(KEY)
            assert second.read_to_end() == b""
        target.send(b"and on")
        assert visitor.read_exactly(6) == b"and on"


def test_a_cancel_request_with_another_key_reaches_nothing_and_says_so(gateway, origin, caplog):
    visitor, target = begin(gateway, origin, "SSLRequest")
    with visitor, target:
        for _ in range(2):
            with Wire(dial_plain(gateway)) as second:
                second.send(cancel_request(KEY[::-1]))
                assert second.read_to_end() == b""  # as PostgreSQL does with an unknown key
        assert origin.was_left_alone()
    lines = [line.levelname for line in caplog.records if "CancelRequest" in line.message]
    assert lines == ["WARNING", "DEBUG"]
    keys = gateway.inner._visitors.cancel_keys
    wait_until(lambda: not keys._routes)  # the session is over
