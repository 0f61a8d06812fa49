"""The inspector's server by raw sockets: what it bounds, and what it refuses."""

import contextlib
import json
import select
import socket
import threading

import pytest
from support import TIMEOUT, Wire, wait_until

from gotunnel_agent.inspector import server as server_module
from gotunnel_agent.inspector.access import Door
from gotunnel_agent.inspector.server import Answer, InspectorServer, Live, as_json, listen

TOKEN = "t" * 43
AUTH = f"Authorization: Bearer {TOKEN}\r\n"


class FakeReader:
    """Events that the test tells."""

    def __init__(self, content=b""):
        self.closed = threading.Event()
        self.content = content

    def next(self, timeout):
        if self.content:
            return self.content
        self.closed.wait(timeout)
        return None if self.closed.is_set() else b""

    def close(self):
        self.content = b""
        self.closed.set()


class FakeSite:
    """Echoes what was asked; /events has a reader, /hold waits for the test."""

    def __init__(self):
        self.readers = []
        self.hold = threading.Event()
        self.asked = []
        self.content = b""

    def body_limit(self, method, path):
        return 1000

    def answer(self, asked):
        if asked.refusal is not None:
            return as_json({"refused": asked.refusal.code}, asked.refusal.status)
        self.asked.append(asked)
        if asked.path == "/events":
            self.readers.append(FakeReader(self.content))
            return Live(self.readers[-1])
        if asked.path == "/hold":
            self.hold.wait(TIMEOUT)
        if asked.path == "/bug":
            raise ZeroDivisionError
        if asked.path == "/missing":
            raise FileNotFoundError
        if asked.path == "/pieces":
            return Answer(200, "text/plain", iter([b"a" * 10, b"", b"b" * 10]))
        return as_json({"path": asked.path, "query": asked.query, "body": asked.body.decode()})


@pytest.fixture
def site():
    return FakeSite()


@pytest.fixture
def port(site):
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    server = InspectorServer(listening, Door(TOKEN, "127.0.0.1", port), site)
    server.start()
    yield port
    site.hold.set()
    server.close()


def dial(port):
    return Wire(socket.create_connection(("127.0.0.1", port), TIMEOUT))


def exchange(port, data):
    """The answer to these bytes, to its end: status, head and body."""
    with dial(port) as wire:
        with contextlib.suppress(OSError):  # the server may have closed already
            wire.send(data)
        answer = wire.read_to_end()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head[9:12] or 0) if head else 0, head.decode(), body


def get(port, path="/", more="", method="GET"):
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{AUTH}{more}\r\n"
    return exchange(port, head.encode("latin-1"))


def test_an_answer_and_its_fields(port):
    status, head, body = get(port, "/a?b=1&b=2&c=%41+d")
    assert status == 200
    assert json.loads(body) == {"path": "/a", "query": {"b": "2", "c": "A d"}, "body": ""}
    for line in (
        "Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Connection: close",
        "Referrer-Policy: no-referrer", "X-Frame-Options: DENY", f"Content-Length: {len(body)}",
        "Cross-Origin-Resource-Policy: same-origin", "Content-Type: application/json",
    ):  # fmt: skip
        assert f"\r\n{line}" in head
    assert "default-src 'none'; frame-ancestors 'none'" in head


def test_head_has_no_body(port):
    status, head, body = get(port, "/a", method="HEAD")
    assert (status, body) == (200, b"")
    assert "Content-Length: 0" not in head


def test_a_body_by_length_and_in_chunks(port):
    status, _, body = exchange(
        port,
        f"POST / HTTP/1.1\r\nHost: localhost\r\n{AUTH}Content-Length: 5\r\n\r\nhellomore".encode(),
    )
    assert (status, json.loads(body)["body"]) == (200, "hello")
    status, _, body = exchange(
        port,
        f"POST / HTTP/1.1\r\nHost: localhost\r\n{AUTH}Transfer-Encoding: chunked\r\n\r\n"
        "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n".encode(),
    )
    assert (status, json.loads(body)["body"]) == (200, "hello")


def test_a_body_is_asked_for(port):
    """curl waits for it with a body of a megabyte."""
    with dial(port) as wire:
        wire.send(
            f"POST / HTTP/1.1\r\nHost: localhost\r\n{AUTH}Content-Length: 5\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert wire.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(b"hello")
        assert b'"body": "hello"' in wire.read_to_end()


def test_pieces_are_chunks_except_for_old_peers(port):
    assert (
        get(port, "/pieces")[2]
        == b"a\r\n" + b"a" * 10 + b"\r\na\r\n" + b"b" * 10 + b"\r\n0\r\n\r\n"
    )
    old = exchange(port, f"GET /pieces HTTP/1.0\r\nHost: localhost\r\n{AUTH}\r\n".encode())
    assert old[2] == b"a" * 10 + b"b" * 10


H = f"Host: localhost\r\n{AUTH}"
BAD = {
    "http 0.9": ("GET /\r\n\r\n", 400),
    "no version": ("GET / \r\n\r\n", 400),
    "http 2 preface": ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "version 3": (f"GET / HTTP/3.0\r\n{H}\r\n", 505),
    "TLS": ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "lf alone": (f"GET / HTTP/1.1\n{H}\n\n", 400),
    "no host": (f"GET / HTTP/1.1\r\n{AUTH}\r\n", 400),
    "two hosts": (f"GET / HTTP/1.1\r\nHost: evil.example\r\n{H}\r\n", 400),
    "another host in the target": (f"GET http://evil.example/ HTTP/1.1\r\n{H}\r\n", 400),
    "rebinding": (f"GET / HTTP/1.1\r\nHost: evil.example\r\n{AUTH}\r\n", 421),
    "rebinding in the target": ("GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", 421),
    "old and without a host": (f"GET / HTTP/1.0\r\n{AUTH}\r\n", 421),
    "CL and TE": (
        f"POST / HTTP/1.1\r\n{H}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "two lengths": (f"POST / HTTP/1.1\r\n{H}Content-Length: 5\r\nContent-Length: 6\r\n\r\na", 400),
    "a length that is none": (f"POST / HTTP/1.1\r\n{H}Content-Length: +5\r\n\r\nhello", 400),
    "a coding": (f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "a bad chunk": (f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "a field with a blank": (f"GET / HTTP/1.1\r\n{H}A : b\r\n\r\n", 400),
    "a folded field": (f"GET / HTTP/1.1\r\n{H}A: b\r\n c\r\n\r\n", 400),
    "a NUL": (f"GET /\0 HTTP/1.1\r\n{H}\r\n", 400),
    "many fields": ("GET / HTTP/1.1\r\n" + H + "A: b\r\n" * 10_000 + "\r\n", 431),
    "a huge field": ("GET / HTTP/1.1\r\n" + H + "A: " + "b" * 100_000 + "\r\n\r\n", 431),
    "a huge line": ("GET /" + "a" * 100_000 + " HTTP/1.1\r\n" + H + "\r\n", 414),
    "a long target": ("GET /" + "a" * 9000 + " HTTP/1.1\r\n" + H + "\r\n", 414),
    "an unknown method": (f"BREW / HTTP/1.1\r\n{H}\r\n", 405),
    "delete": (f"DELETE / HTTP/1.1\r\n{H}\r\n", 405),
    "options": (f"OPTIONS * HTTP/1.1\r\n{H}\r\n", 405),
    "trace": (f"TRACE / HTTP/1.1\r\n{H}\r\n", 405),
    "connect": ("CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n", 421),
    "connect to us": (f"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost:443\r\n{AUTH}\r\n", 501),
    "a body that is too long": (f"POST / HTTP/1.1\r\n{H}Content-Length: 1001\r\n\r\n", 413),
    "chunks that are too long": (
        f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: chunked\r\n\r\n3e9\r\n{'a' * 1001}\r\n0\r\n\r\n",
        413,
    ),
    "a page from elsewhere": (f"POST / HTTP/1.1\r\n{H}Origin: http://evil.example\r\n\r\n", 403),
    "an image from elsewhere": (f"GET /a HTTP/1.1\r\n{H}Sec-Fetch-Site: cross-site\r\n\r\n", 403),
    "a body without the token": (
        "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\na", 401,
    ),
    "no token": ("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 401),
    "events by head": (f"HEAD /events HTTP/1.1\r\n{H}\r\n", 405),
    "a file that is missing": (f"GET /missing HTTP/1.1\r\n{H}\r\n", 500),
    "a bug": (f"GET /bug HTTP/1.1\r\n{H}\r\n", 500),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), BAD.values(), ids=list(BAD))
def test_what_is_refused(port, data, expected):
    status, head, body = exchange(port, data.encode("latin-1"))
    assert status == expected
    assert "X-Content-Type-Options: nosniff" in head
    if not data.startswith("HEAD"):
        assert json.loads(body)  # an object, and no page
        assert b"Traceback" not in body and b"\n" not in body.rstrip(b"\n")
    assert get(port, "/")[0] == 200  # the next one is answered


@pytest.mark.parametrize("count", [1, 7])
def test_bytes_that_trickle_are_put_together(port, count):
    head = f"GET /a HTTP/1.1\r\nHost: localhost\r\n{AUTH}\r\n".encode()
    with dial(port) as wire:
        for at in range(0, len(head), count):
            wire.send(head[at : at + count])
        assert b'"path": "/a"' in wire.read_to_end()


def test_a_second_request_is_not_answered(port, site):
    """One request a connection: what comes behind it is read for nothing."""
    one = f"GET /1 HTTP/1.1\r\nHost: localhost\r\n{AUTH}\r\n"
    _, _, body = exchange(port, (one + one.replace("/1", "/2")).encode())
    assert json.loads(body)["path"] == "/1"
    assert [asked.path for asked in site.asked] == ["/1"]


def test_a_slow_head_is_cut(port, monkeypatch):
    monkeypatch.setattr(server_module, "HEAD_TIMEOUT", 0.05)
    with dial(port) as wire:
        wire.send(b"GET / HTTP/1.1\r\n")
        assert wire.read_to_end() == b""


def test_a_slow_body_is_cut(port, monkeypatch):
    monkeypatch.setattr(server_module, "BODY_TIMEOUT", 0.05)
    with dial(port) as wire:
        wire.send(
            f"POST / HTTP/1.1\r\nHost: localhost\r\n{AUTH}Content-Length: 9\r\n\r\na".encode()
        )
        assert wire.read_to_end().startswith(b"HTTP/1.1 408 ")


def test_large_bodies_are_read_one_at_a_time(port, monkeypatch):
    """Twelve archives of 32 MiB at once would be 400 MB."""
    monkeypatch.setattr(server_module, "LARGE", 100)
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\n{AUTH}Content-Length: 200\r\n"
    with dial(port) as first:
        first.send(f"{head}Expect: 100-continue\r\n\r\n".encode())
        first.read_head()
        first.send(b"a")
        with dial(port) as second:
            wait_until(lambda: exchange(port, f"{head}\r\na".encode())[0] == 503)
            second.send(f"{head.replace('200', '100')}\r\n{'a' * 100}".encode())
            assert second.read_to_end().startswith(b"HTTP/1.1 200 ")
        first.send(b"a" * 199)
        assert first.read_to_end().startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: exchange(port, f"{head}\r\n{'a' * 200}".encode())[0] == 200)


def test_many_silent_connections_keep_nobody_out(port, monkeypatch):
    """The oldest are closed."""
    monkeypatch.setattr(server_module, "MOST_PARKED", 10)
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(dial(port)) for _ in range(40)]
        for wire in silent:
            with contextlib.suppress(OSError):  # closed already, as one of the oldest
                wire.send(b"GET / HTTP/1.1\r\nHost: ")
        assert get(port)[0] == 200
        assert silent[0].read_to_end() == b""


def test_workers_that_are_all_busy_keep_others_waiting_and_then_out(port, site, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_QUEUED", 2)
    head = f"GET /hold HTTP/1.1\r\nHost: localhost\r\n{AUTH}\r\n".encode()
    with contextlib.ExitStack() as opened:
        wires = [opened.enter_context(dial(port)) for _ in range(server_module.MOST_SERVED)]
        for wire in wires:
            wire.send(head)
        wait_until(lambda: len(site.asked) == server_module.MOST_SERVED)
        late = [opened.enter_context(dial(port)) for _ in range(4)]
        for wire in late:
            wire.send(head)
        refused = wait_until(lambda: two_of(late))
        assert all(b'"error": "busy"' in wire.read_to_end() for wire in refused)
        site.hold.set()
        served = [wire for wire in wires + late if wire not in refused]
        assert all(b"200 OK" in wire.read_to_end() for wire in served)


def two_of(wires):
    """Those that have something to read, once they are two."""
    ready = select.select([wire.sock for wire in wires], [], [], 0)[0]
    return [wire for wire in wires if wire.sock in ready] if len(ready) == 2 else None


# Events ------------------------------------------------------------------------------------------


def events(port, fields=AUTH):
    wire = dial(port)
    wire.send(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{fields}\r\n".encode())
    return wire


def cookie(port):
    door = Door(TOKEN, "127.0.0.1", port)
    return f"Cookie: {door.cookie_name}={door.cookie_value}\r\n"


def test_events_begin_at_once(port):
    with events(port) as wire:
        assert b"Content-Type: text/event-stream\r\n" in wire.read_head()
        assert wire.read_until(b"\n\n") == b": ping\n\n"


def test_a_reader_that_leaves_frees_its_place_at_once(port, site):
    for _ in range(3 * server_module.MOST_LIVE):
        with events(port) as wire:
            wire.read_until(b": ping")
        assert wait_until(site.readers[-1].closed.is_set)
    wait_until(lambda: get(port)[0] == 200)
    with events(port) as wire:
        wire.read_until(b": ping")


def test_a_browser_gets_a_few_readers_and_others_the_rest(port):
    """A browser has six connections for all its tabs."""
    with contextlib.ExitStack() as opened:
        for _ in range(server_module.MOST_BROWSERS):
            opened.enter_context(events(port, cookie(port))).read_until(b": ping")
        with events(port, cookie(port)) as wire:
            head, body = wire.read_message()
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["error"] == "readers"
        for _ in range(server_module.MOST_LIVE - server_module.MOST_BROWSERS):
            opened.enter_context(events(port)).read_until(b": ping")
        with events(port) as wire:
            assert wire.read_head().startswith(b"HTTP/1.1 503 ")
        assert get(port)[0] == 200


def test_a_reader_that_stops_reading_is_cut(port, site, monkeypatch):
    monkeypatch.setattr(server_module, "SEND_TIMEOUT", 0.1)
    site.content = b"x" * 100_000
    with events(port):
        wait_until(lambda: site.readers and site.readers[-1].closed.is_set())


def test_close_ends_all(site):
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    server = InspectorServer(listening, Door(TOKEN, "127.0.0.1", port), site)
    server.start()
    with contextlib.ExitStack() as opened:
        wires = [opened.enter_context(events(port)) for _ in range(3)]
        for wire in wires:
            wire.read_until(b": ping")
        silent = opened.enter_context(dial(port))
        silent.send(b"GET")
        before = get(port)[0]
        server.close()
        assert before == 200
        assert [wire.read_to_end() for wire in [*wires, silent]] == [b"\n\n"] * 3 + [b""]
    assert not [each for each in threading.enumerate() if each.name.startswith("inspect")]
