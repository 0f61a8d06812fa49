"""Visits by HTTP/2: what the visitor and the target see, frame by frame."""

import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time

import pytest
from http2_by_hand import (
    ACK,
    DATA,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PRIORITY_UPDATE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    context_for,
    frame,
    head,
    http2_visitor,
    number,
    settings,
)
from support import (
    APP,
    GATEWAY_HOST,
    MIB,
    RAW,
    TIMEOUT,
    agent_here,
    answer,
    dial_tls,
    fields_of,
    gateway_here,
    request,
    wait_until,
)

from gotunnel_agent.common import packages
from gotunnel_server import config as server_config
from gotunnel_server.net import listener as listener_module
from gotunnel_server.variables import ConfigError
from gotunnel_server.visitors import http2 as http2_door
from gotunnel_server.visitors import http2_output, http2_reader, http2_windows, relays
from gotunnel_server.visitors.http2_frames import START_WINDOW
from gotunnel_server.visitors.http2_windows import Growth, Window

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3


@pytest.fixture
def gateway(cache, tmp_path, origin):
    with gateway_here(cache, WORKERS="1024") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}, tcp={RAW: origin.port}):
            yield gateway


@pytest.fixture
def quick_sweeps(monkeypatch):
    monkeypatch.setattr(http2_reader, "SWEEP", 0.05)
    monkeypatch.setattr(listener_module, "SWEEP", 0.05)


@contextlib.contextmanager
def served(cache, tmp_path, origin, subscribers=(), keys={}, **changes):
    """A gateway with other settings."""
    with gateway_here(cache, subscribers, **changes) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}, **keys):
            yield gateway


def echo(target):
    """A target that answers each request with its method, path and body."""
    while True:
        head, body = target.read_message()
        first = head.split(b" HTTP/")[0]
        target.send(answer(first + b" " + body))


# Requests and answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostname", "offered", "selected"),
    [
        (APP, "h2 http/1.1", "h2"), (APP, "http/1.1 h2", "h2"), (APP, "http/1.1", "http/1.1"),
        (APP, "h2", "h2"), (GATEWAY_HOST, "h2", "h2"), (RAW, "h2 http/1.1", "http/1.1"),
        (RAW, "imap h2", "imap"),
    ],
)  # fmt: skip
def test_http2_is_for_hostnames_in_http_mode(gateway, origin, hostname, offered, selected):
    # Else the agent would give the visit in tcp mode its time when it stops.
    origin.serve(lambda target: target.read_to_end())
    with dial_tls(gateway.public_port, hostname, context_for(gateway, *offered.split())) as wire:
        assert wire.sock.selected_alpn_protocol() == selected


def test_http2_can_be_turned_off(cache):
    with gateway_here(cache, HTTP2="off") as gateway:
        with dial_tls(gateway.public_port, GATEWAY_HOST, context_for(gateway)) as wire:
            assert wire.sock.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("found, state", [(None, "is missing"), ("4.0.0", "is 4.0.0")])
def test_without_the_library_http2_is_off_unless_it_is_asked_for(monkeypatch, found, state):
    said = (
        f"hpack {state}, expected >=4.1,<5; to install it: {sys.executable} -m pip install "
        "'hpack>=4.1,<5'"
    )
    least = {"GATEWAY_HOST": "a.test", "TUNNEL_HOST": "b.test", "JWT_SECRET": "x" * 32}
    assert server_config.load(os.devnull, least).http2
    monkeypatch.setattr(http2_door, "lacks", lambda: packages.Fault(packages.HPACK, found))
    config = server_config.load(os.devnull, least)
    assert not config.http2
    assert [line for line in config.warnings if "HTTP/2" in line] == (
        [] if found is None else [f"visitors get no HTTP/2: the Python package {said}; or set "
                                  "HTTP2=off"]
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=re.escape(f"HTTP2 is 'on', but the Python package {said}")
    ):
        server_config.load(os.devnull, least | {"HTTP2": "on"})


def test_get(gateway, origin):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, ("user-agent", "by hand"), ("cookie", "a=1"), ("cookie", "b=2"), path="/a?b")
        with origin.accept() as target:
            head = target.read_head()
            assert head.startswith(b"GET /a?b HTTP/1.1\r\n")
            fields = fields_of(head)
            assert {
                f"host: {APP}", "user-agent: by hand", "cookie: a=1; b=2",
                "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: https",
            } <= set(fields)  # fmt: skip
            target.send(answer(b"hello", "X-One: 1", "Set-Cookie: c=d", "Connection: keep-alive"))
            status, fields, body = visitor.answer(1)
    assert (status, body) == (200, b"hello")
    assert fields["content-length"] == "5" and fields["x-one"] == "1"
    assert fields["set-cookie"] == "c=d" and "connection" not in fields


@pytest.mark.parametrize("length", [None, 300_000], ids=["open end", "content-length"])
def test_post_arrives_whole_and_in_order(gateway, origin, length):
    body = os.urandom(300_000)
    fields = [("content-length", str(length))] if length else []
    origin.serve(lambda target: target.send(answer(_digest(target.read_message()[1]))))
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, *fields, method="POST", end=False)
        send_body(visitor, 1, body)
        assert visitor.answer(1)[2] == _digest(body)


def _digest(data) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def send_body(visitor, stream, body, end=True):
    """Send a body as far as the windows permit, and wait for more."""
    windows = {0: 65_535, stream: 65_535}
    at = 0
    while at < len(body):
        room = min(16_384, len(body) - at, *windows.values())
        if room <= 0:
            kind, flags, updated, payload = visitor.wait_for(WINDOW_UPDATE, SETTINGS)
            if kind == WINDOW_UPDATE and updated in windows:
                windows[updated] += int.from_bytes(payload, "big")
            elif kind == SETTINGS and not flags:
                windows[stream] += START_WINDOW - 65_535
            continue
        last = end and at + room == len(body)
        visitor.send(frame(DATA, END_STREAM if last else 0, stream, body[at : at + room]))
        at += room
        windows[0] -= room
        windows[stream] -= room


@pytest.mark.parametrize(
    ("method", "reply", "status", "body"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", 200, b""),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", 304, b""),
        ("GET", answer(b""), 200, b""),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
         200, b"abc"),
    ],
)  # fmt: skip
def test_framing_of_answers(gateway, origin, method, reply, status, body):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, method=method)
        with origin.accept() as target:
            target.read_head()
            target.send(reply)
            found = visitor.answer(1)
    assert (found[0], found[2]) == (status, body)
    assert method != "HEAD" or found[1]["content-length"] == "9"


def test_interim_answers_and_trailers_both_ways(gateway, origin):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, ("expect", "100-continue"), ("te", "trailers"), method="POST", end=False)
        with origin.accept() as target:
            assert b"\r\ntransfer-encoding: chunked\r\n" in target.read_head().lower()
            target.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n")
            target.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            heads = [dict(visitor.wait_for(HEADERS)[3]) for _ in range(2)]
            assert [found[":status"] for found in heads] == ["103", "100"]
            visitor.send(frame(DATA, 0, 1, b"body"), visitor.headers(1, [("x-check", "sum")]))
            assert target.read_until(b"0\r\n") == b"4\r\nbody\r\n0\r\n"
            assert target.read_until(b"\r\n\r\n").lower() == b"x-check: sum\r\n\r\n"
            target.send(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n"
                b"2\r\nok\r\n0\r\nX-End: yes\r\n\r\n"
            )
            status, fields, body = visitor.answer(1)
    assert (status, body, fields["x-end"]) == (200, b"ok", "yes")


def test_early_answer_is_whole_and_ends_the_upload_without_an_error(gateway, origin):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, method="POST", end=False)
        visitor.send(frame(DATA, 0, 1, b"x" * 1000))
        with origin.accept() as target:
            target.read_head()
            target.send(answer(b"no more", "Connection: close", status="413 Too Large"))
            assert visitor.answer(1)[::2] == (413, b"no more")
            assert visitor.reset(1) == "NO_ERROR"
        visitor.send(frame(DATA, END_STREAM, 1, b"late"))  # is dropped
        visitor.ask(3)
        with origin.accept() as target:
            target.read_head()
            target.send(answer(b"next"))
            assert visitor.answer(3)[2] == b"next"


def test_upload_and_answer_flow_at_the_same_time(gateway, origin):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, method="POST", end=False)
        with origin.accept() as target:
            target.read_head()
            target.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            visitor.wait_for(HEADERS)
            for word in (b"one", b"two"):
                visitor.send(frame(DATA, 0, 1, word))
                assert target.read_until(word + b"\r\n")
                target.send(b"3\r\n" + word + b"\r\n")
                assert visitor.wait_for(DATA)[3] == word


def test_answers_come_in_the_order_in_which_they_are_ready(gateway, origin):
    with http2_visitor(gateway) as visitor:
        for stream in (1, 3, 5):
            visitor.ask(stream, path=f"/{stream}")
        targets = {}
        for _ in range(3):
            target = origin.accept()
            targets[int(target.read_head().split()[1][1:])] = target
        for stream in (5, 1, 3):
            targets[stream].send(answer(b"%d" % stream))
            assert visitor.wait_for(HEADERS)[2] == stream


def test_connection_carries_many_requests(gateway, origin):
    origin.serve(echo)
    with http2_visitor(gateway) as visitor:
        for stream in range(1, 201, 2):
            visitor.ask(stream, path=f"/{stream}")
        for _ in range(100):
            assert dict(visitor.wait_for(HEADERS)[3])[":status"] == "200"


def test_pings_are_answered_and_priorities_ignored(gateway):
    with http2_visitor(gateway) as visitor:
        visitor.send(
            frame(2, 0, 1, number(0) + b"\x10"), frame(77, 0, 9, b"extension"),
            frame(PING, 0, 0, b"12345678"),
        )  # fmt: skip
        assert visitor.wait_for(PING) == (PING, ACK, 0, b"12345678")


def test_pages_of_the_gateway(gateway):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, host="other.localhost")
        status, fields, body = visitor.answer(1)
        assert (status, fields["x-gotunnel-error"]) == (421, "misdirected")
        assert len(body) == int(fields["content-length"])
        visitor.ask(3, path="/" + "x" * 9000)
        assert visitor.answer(3)[0] == 414
        visitor.ask(5, *((f"x-{count}", "") for count in range(201)))
        assert visitor.answer(5)[0] == 431
    with http2_visitor(gateway, GATEWAY_HOST) as visitor:
        visitor.ask(1, host=GATEWAY_HOST)
        assert visitor.answer(1)[0] == 200


def test_policies_hold(cache, tmp_path, origin):
    origin.serve(echo)
    keys = {"tunnels": [{
        "hostname": APP, "target": f"127.0.0.1:{origin.port}", "basic_auth": ["ann:secret word"],
    }]}  # fmt: skip
    with served(cache, tmp_path, origin, keys=keys) as gateway:
        gateway.wait_for_routes(APP)
        with http2_visitor(gateway) as visitor:
            visitor.ask(1)
            assert visitor.answer(1)[0] == 401
            word = base64.b64encode(b"ann:secret word").decode()
            visitor.ask(3, ("authorization", f"Basic {word}"))
            assert visitor.answer(3)[0] == 200


def test_login_that_is_bound_to_a_connection_is_sent_back_to_http_1_1(gateway, origin):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1)
        with origin.accept() as target:
            target.read_head()
            target.send(answer(b"", "WWW-Authenticate: NTLM", status="401 Unauthorized"))
            assert visitor.reset(1) == "HTTP_1_1_REQUIRED"


def test_visits_are_recorded(cache, tmp_path, origin):
    origin.serve(echo)
    visits = []
    with served(cache, tmp_path, origin, [visits.extend]) as gateway:
        with http2_visitor(gateway) as visitor:
            visitor.ask(1, path="/good")
            visitor.answer(1)
            visitor.ask(3, ("connection", "close"))
            visitor.reset(3)
            wait_until(lambda: len(visits) == 2)
    good, bad = sorted(visits, key=lambda visit: visit.status)  # two threads record them
    assert (good.protocol, good.method, good.path, good.status) == ("HTTP/2.0", "GET", "/good", 200)
    assert good.sent > len(b"GET /good ") and good.received and good.scheme == "https"
    assert (bad.status, bad.error) == (400, "malformed-request")


def test_trusted_proxy_names_its_visitor(cache, tmp_path, origin):
    with served(cache, tmp_path, origin, TRUSTED_PROXIES="127.0.0.1") as gateway:
        with http2_visitor(gateway) as visitor:
            visitor.ask(1, ("x-forwarded-for", "192.0.2.7"))
            with origin.accept() as target:
                assert "x-forwarded-for: 192.0.2.7, 127.0.0.1" in fields_of(target.read_head())


# Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
def test_answer_cut_short_never_looks_complete(gateway, origin, chunked):
    framing = (
        b"Transfer-Encoding: chunked\r\n\r\n5\r\n" if chunked else b"Content-Length: 9\r\n\r\n"
    )
    with http2_visitor(gateway) as visitor:
        visitor.ask(1)
        with origin.accept() as target:
            target.read_head()
            target.send(b"HTTP/1.1 200 OK\r\n" + framing + b"half ")
            visitor.wait_for(DATA)
        assert visitor.reset(1) == "INTERNAL_ERROR"
        visitor.ask(3)  # the connection goes on
        with origin.accept() as target:
            target.read_head()
            target.send(answer(b"well"))
            assert visitor.answer(3)[2] == b"well"


@pytest.mark.parametrize("leave", ["reset", "close"])
@pytest.mark.parametrize("uploading", [True, False])
def test_target_learns_soon_that_its_visitor_has_gone(gateway, origin, leave, uploading):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, method="POST", end=not uploading)
        with origin.accept() as target:
            target.read_head()
            if leave == "reset":
                visitor.send(frame(RST_STREAM, 0, 1, number(8)))
            else:
                visitor.wire.close()
            with pytest.raises((ConnectionError, AssertionError)):
                target.read_until(b"never")


def test_websocket_over_a_stream(gateway, origin):
    """RFC 8441: an extended CONNECT becomes the upgrade that the target knows."""
    with http2_visitor(gateway) as visitor:
        assert (8, 1) in _settings_of(visitor.wait_for(SETTINGS)[3])
        block = head((":protocol", "websocket"), ("sec-websocket-version", "13"), method="CONNECT",
                     path="/chat")  # fmt: skip
        visitor.send(visitor.headers(1, block, end=False))
        with origin.accept() as target:
            asked = target.read_head()
            assert asked.startswith(b"GET /chat HTTP/1.1\r\n")
            fields = dict(line.split(": ", 1) for line in asked.decode().split("\r\n")[1:-2])
            fields = {name.lower(): value for name, value in fields.items()}
            assert (fields["upgrade"], fields["connection"]) == ("websocket", "Upgrade")
            key = fields["sec-websocket-key"] + GUID
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
            target.send(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: %b\r\n\r\nfirst" % accept.encode()
            )
            found = dict(visitor.wait_for(HEADERS)[3])
            assert found[":status"] == "200"
            assert not {"upgrade", "sec-websocket-accept"} & set(found)
            assert visitor.wait_for(DATA)[3] == b"first"
            visitor.send(frame(DATA, 0, 1, b"from the visitor"))
            assert target.read_exactly(16) == b"from the visitor"
            target.send(b"from the target")
            assert visitor.wait_for(DATA)[3] == b"from the target"
            visitor.send(frame(DATA, END_STREAM, 1))  # a half-close
            assert target.read() == b""
        assert visitor.wait_for(DATA, RST_STREAM)[0] == DATA  # END_STREAM
        wait_until(lambda: not streams_of(gateway))


def test_target_that_does_not_prove_to_speak_websocket_is_refused(gateway, origin):
    """An HTTP/2 visitor cannot check it: RFC 8441 has no Sec-WebSocket-Accept."""
    with http2_visitor(gateway) as visitor:
        block = head((":protocol", "websocket"), method="CONNECT", path="/chat")
        visitor.send(visitor.headers(1, block, end=False))
        with origin.accept() as target:
            target.read_head()
            target.send(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: no\r\n\r\n"
            )
            found = dict(visitor.wait_for(HEADERS)[3])
            assert (found[":status"], found["x-gotunnel-error"]) == ("502", "bad-answer")


def connections_of(gateway):
    return list(gateway.inner._visitors.http2.reader._known)


def streams_of(gateway):
    """The streams that are open, as the rules of the connections have them."""
    return [id for connection in connections_of(gateway) for id in connection._frames._streams]


@pytest.mark.parametrize("half_close", [True, False])
def test_websocket_that_its_target_ends_is_over(gateway, origin, monkeypatch, half_close):
    """Also if its agent cannot half-close, and its visitor says nothing more."""
    monkeypatch.setattr(relays, "LAST_BYTES_TIMEOUT", 0.1)
    (tunnel,) = gateway.inner.tunnels.registered()
    monkeypatch.setattr(tunnel, "upgrades", half_close)
    with http2_visitor(gateway) as visitor:
        block = head((":protocol", "websocket"), method="CONNECT")
        visitor.send(visitor.headers(1, block, end=False))
        with origin.accept() as target:
            asked = target.read_head().decode()
            key = re.search("(?i)sec-websocket-key: (.*)\r", asked)[1] + GUID
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
            target.send(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Accept: %b\r\n\r\nlast" % accept.encode()
            )
        assert visitor.wait_for(DATA)[3] == b"last"
        if half_close:
            visitor.send(frame(DATA, END_STREAM, 1))
        wait_until(lambda: not streams_of(gateway))


def test_fault_beside_a_download_that_waits_for_its_visitor_ends_by_a_goodbye(
    gateway, origin, monkeypatch
):
    """The thread that writes is not disturbed, and GOAWAY comes behind what it writes: no more is
    added, however long the thread takes that has noticed the fault."""
    flush = http2_output.Output.flush
    monkeypatch.setattr(http2_output.Output, "flush", lambda self: time.sleep(0.1) or flush(self))
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"x" * 40 * MIB))))
    with http2_visitor(gateway, first=settings(s4=2**30)) as visitor:
        visitor.grant()
        visitor.ask(1)
        visitor.wait_for(DATA)
        wait_until(lambda: any(c.duplex._writer_waits for c in connections_of(gateway)))
        visitor.send(frame(PING, 0, 1, b"12345678"))
        assert visitor.goodbye() == (1, "PROTOCOL_ERROR")
        assert visitor.wire.read() == b""


def _settings_of(payload):
    pairs = [payload[at : at + 6] for at in range(0, len(payload), 6)]
    return {(int.from_bytes(pair[:2], "big"), int.from_bytes(pair[2:], "big")) for pair in pairs}


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (answer(b"no", status="403 Forbidden"), 403),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
         b"Sec-WebSocket-Accept: wrong\r\n\r\n", 502),
    ],
    ids=["declined", "no WebSocket"],
)  # fmt: skip
def test_websocket_that_the_target_declines(gateway, origin, reply, status):
    with http2_visitor(gateway) as visitor:
        block = head((":protocol", "websocket"), method="CONNECT")
        visitor.send(visitor.headers(1, block, end=False))
        with origin.accept() as target:
            target.read_head()
            target.send(reply)
            assert visitor.answer(1)[0] == status


def test_connect_reaches_a_tcp_hostname(gateway, origin):
    with http2_visitor(gateway, GATEWAY_HOST) as visitor:
        authority = f"{RAW}:{gateway.public_port}"
        block = head(method="CONNECT", host=authority, path=None, scheme=None)
        visitor.send(visitor.headers(1, block, end=False), frame(DATA, 0, 1, b"hello"))
        with origin.accept() as target:
            assert target.read_exactly(5) == b"hello"
            target.send(b"welcome")
            assert dict(visitor.wait_for(HEADERS)[3])[":status"] == "200"
            assert visitor.wait_for(DATA)[3] == b"welcome"
        assert visitor.wait_for(DATA)[1] == END_STREAM


def test_gateway_that_stops_says_goodbye_and_completes_what_runs(cache, tmp_path, origin):
    with served(cache, tmp_path, origin, DRAIN_TIMEOUT="10") as gateway:
        with http2_visitor(gateway) as visitor, http2_visitor(gateway) as idle:
            visitor.ask(1)
            with origin.accept() as target:
                target.read_head()
                stopping = threading.Thread(target=gateway.inner.stop)
                stopping.start()
                assert idle.goodbye() == (0, "NO_ERROR")
                assert visitor.goodbye() == (1, "NO_ERROR")
                visitor.ask(3)
                assert visitor.reset(3) == "REFUSED_STREAM"
                target.send(answer(b"the last"))
                assert visitor.answer(1)[2] == b"the last"
            assert visitor.wire.read() == b""
            stopping.join(TIMEOUT)
            assert not stopping.is_alive()


def test_idle_connection_is_closed_with_a_goodbye(cache, tmp_path, origin, quick_sweeps):
    with served(cache, tmp_path, origin, IDLE_TIMEOUT="0.3") as gateway:
        with http2_visitor(gateway) as visitor:
            assert visitor.goodbye() == (0, "NO_ERROR")
            assert visitor.wire.read() == b""


def test_slow_preface_is_not_waited_for(cache, tmp_path, origin, quick_sweeps):
    with served(cache, tmp_path, origin, HEADER_TIMEOUT="0.3") as gateway:
        with dial_tls(gateway.public_port, APP, context_for(gateway)) as wire:
            wire.send(b"PRI * HT")
            assert wire.read_to_end()  # SETTINGS, GOAWAY, then the end


def test_body_that_never_comes_is_a_408(cache, tmp_path, origin):
    with served(cache, tmp_path, origin, IDLE_TIMEOUT="0.4") as gateway:
        with http2_visitor(gateway) as visitor:
            visitor.ask(1, method="PUT", end=False)
            status, fields, _ = visitor.answer(1)
            assert (status, fields["x-gotunnel-error"]) == (408, "body-timeout")
            assert visitor.reset(1) == "NO_ERROR"


def test_long_upload_is_no_unfinished_frame(cache, tmp_path, origin, quick_sweeps):
    origin.serve(echo)
    with served(cache, tmp_path, origin, HEADER_TIMEOUT="0.3") as gateway:
        with http2_visitor(gateway) as visitor:
            visitor.ask(1, method="PUT", end=False)
            body = frame(DATA, 0, 1, b"x" * 1000) * 20 + frame(DATA, END_STREAM, 1, b"y")
            for at in range(0, len(body), 900):  # each piece ends in the middle of a frame
                visitor.send(body[at : at + 900])
                time.sleep(0.04)
            assert visitor.answer(1)[2] == b"PUT / " + b"x" * 20_000 + b"y"


def test_visit_waits_for_its_agent_with_its_body(tmp_path, origin):
    own = tmp_path / "cache"
    own.mkdir()
    origin.serve(echo)
    with gateway_here(own, AGENT_TIMEOUT="10") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            pass
        with http2_visitor(gateway) as visitor:
            visitor.ask(1)
            visitor.ask(3, method="PUT", end=False)
            visitor.send(frame(DATA, END_STREAM, 3, b"body"))
            wait_until(lambda: len(gateway.inner._waiting._guests) == 2)
            with agent_here(gateway, tmp_path, http={APP: origin.port}):
                bodies = {}
                while len(bodies) < 2:
                    _, _, stream, payload = visitor.wait_for(DATA)
                    bodies[stream] = payload
        assert bodies == {1: b"GET / ", 3: b"PUT / body"}


# Places, windows and turns -----------------------------------------------------------------------


def test_requests_beyond_the_places_wait_for_those_of_their_connection(cache, tmp_path, origin):
    with served(cache, tmp_path, origin, WORKERS="6") as gateway:
        with http2_visitor(gateway) as visitor:
            for stream in range(1, 13, 2):
                visitor.ask(stream, path=f"/{stream}")
            first = [origin.accept() for _ in range(2)]  # a third of the places
            assert origin.was_left_alone()
            origin.serve(echo)
            for target in first:
                target.read_head()
                target.send(answer(b"ok", "Connection: close"))
            for _ in range(6):
                assert dict(visitor.wait_for(HEADERS)[3])[":status"] == "200"


def test_request_without_any_place_is_refused_and_may_be_repeated(cache, tmp_path, origin):
    with served(cache, tmp_path, origin, WORKERS="1") as gateway:
        with http2_visitor(gateway) as one, http2_visitor(gateway) as other:
            one.ask(1)
            with origin.accept() as target:
                other.ask(1)
                assert other.reset(1) == "REFUSED_STREAM"
                target.read_head()
                target.send(answer())
                one.answer(1)


def test_streams_beyond_the_limit_are_refused_alone(gateway, origin):
    with http2_visitor(gateway) as visitor:
        for stream in range(1, 203, 2):
            visitor.ask(stream, method="POST", end=False)
        assert visitor.reset(201) == "REFUSED_STREAM"
        visitor.send(frame(PING, 0, 0, b"12345678"))
        visitor.wait_for(PING)


def test_visitor_waits_for_a_target_that_does_not_read(gateway, origin):
    """What was sent, and not read, stays within the windows."""
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, method="POST", end=False)
        with origin.accept():
            sent, window = 0, {0: 65_535, 1: 65_535}
            visitor.wire.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                while sent < 64 * MIB:
                    while min(window.values()) < 16_384:
                        kind, flags, stream, payload = visitor.read()
                        if kind == WINDOW_UPDATE:
                            window[stream] += int.from_bytes(payload, "big")
                    visitor.send(frame(DATA, 0, 1, b"x" * 16_384))
                    sent += 16_384
                    window = {key: size - 16_384 for key, size in window.items()}
            assert START_WINDOW <= sent < 64 * MIB


@pytest.mark.parametrize(
    ("seconds", "kept_up", "grown"), [(0.01, True, True), (1.0, True, False), (0.01, False, False)]
)
def test_window_doubles_while_it_is_used_quickly_and_read(seconds, kept_up, grown):
    growth = Growth()
    window = Window(100, 1000, growth)
    now, granted = 10.0, 0
    window.consumed(50, True, now)
    for _ in range(20):
        now += seconds
        granted += window.consumed(window.size // 2, kept_up, now)
    assert (window.size > 100) == grown and window.size <= 1000
    window.end()
    assert growth._free == http2_windows.MOST_GROWTH


def test_windows_of_all_connections_share_what_they_may_grow():
    growth = Growth(most=100)
    one, other = Window(100, 1000, growth), Window(100, 1000, growth)
    for window in (one, other):
        window.consumed(50, True, 0.0)
        window.consumed(100, True, 0.01)
    assert sorted((one.size, other.size)) == [100, 200]


def test_small_answer_does_not_wait_behind_a_download(gateway, origin):
    def script(target):
        if target.read_head().startswith(b"GET /large"):
            target.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 * MIB))
            for _ in range(64):
                target.send(b"x" * MIB)
        else:
            target.send(answer(b"small"))

    origin.serve(script)
    with http2_visitor(gateway, first=settings(s4=2**30)) as visitor:
        visitor.grant()
        visitor.ask(1, path="/large")
        visitor.wait_for(DATA, stream=1)
        visitor.ask(3, path="/small")
        behind = 0
        while (found := visitor.wait_for(DATA, HEADERS))[2] != 3:
            behind += len(found[3])
        assert behind < 12 * MIB  # most of it lies in the kernel's buffers of this one machine
        assert visitor.wait_for(DATA, stream=3)[3] == b"small"


def test_more_urgent_answer_goes_first(gateway, origin):
    """Of two answers that wait for the connection's window, the urgent one gets it."""
    body = b"x" * 200_000
    origin.serve(lambda target: (target.read_head(), target.send(answer(body))))
    with http2_visitor(gateway, first=settings(s4=2**30)) as visitor:
        visitor.ask(1, ("priority", "u=5"))
        visitor.ask(3, ("priority", "u=5"))
        visitor.send(frame(PRIORITY_UPDATE, 0, 0, number(3) + b"u=0, i"))
        came = {1: 0, 3: 0}
        while sum(came.values()) < 65_535:  # the connection's window is used up
            _, _, stream, payload = visitor.wait_for(DATA)
            came[stream] += len(payload)
        wait_until(lambda: _waiting(gateway) == 2)
        visitor.grant(size=30_000)
        _, _, stream, payload = visitor.wait_for(DATA)
        assert stream == 3 and len(payload) > 10_000


def _waiting(gateway):
    return sum(len(connection.output._waiting) for connection in connections_of(gateway))


def test_window_that_opens_later_lets_the_answer_go_on(gateway, origin):
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"0123456789"))))
    with http2_visitor(gateway, first=settings(s4=0)) as visitor:
        visitor.ask(1)
        visitor.wait_for(HEADERS)
        visitor.send(settings(s4=3))
        assert visitor.wait_for(DATA)[3] == b"012"
        visitor.grant(3, 1)
        assert visitor.wait_for(DATA)[3] == b"345"
        visitor.send(settings(s4=1))  # the window becomes -2
        visitor.grant(4, 1)
        assert visitor.wait_for(DATA)[3] == b"67"
        visitor.send(settings(s4=100))
        assert visitor.wait_for(DATA)[3] == b"89"


@pytest.mark.parametrize("whole", [False, True], ids=["a stream's window", "the connection"])
def test_visitor_that_reads_nothing_is_cut(cache, tmp_path, origin, monkeypatch, whole):
    monkeypatch.setattr(http2_output, "STALL_LOOK", 0.05)
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"x" * 40 * MIB))))
    with served(cache, tmp_path, origin, STALL_TIMEOUT="1") as gateway:
        with http2_visitor(gateway, first=settings(s4=2**30 if whole else 0)) as visitor:
            visitor.ask(1)
            if whole:
                visitor.grant()
                wait_until(lambda: not list(gateway.inner._visitors.http2.reader._known))
            else:
                assert visitor.reset(1) == "CANCEL"
                visitor.send(frame(PING, 0, 0, b"12345678"))
                visitor.wait_for(PING)


def test_hundred_visitors_mix_both_protocols_without_mixing_their_answers(gateway, origin):
    """Unique bodies, over one HTTP/2 connection with several streams and over HTTP/1.1."""
    cross_talk(gateway, origin, streams=10, rounds=8)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_cross_talk_of_50_streams_with_200_requests_each(gateway, origin):
    cross_talk(gateway, origin, streams=50, rounds=200)


def cross_talk(gateway, origin, streams, rounds):
    origin.serve(echo)
    wrong = []

    def by_http_1_1(name):
        with gateway.dial(APP) as wire:
            for turn in range(rounds):
                body = f"one-{name}-{turn}-".encode() * 50
                wire.send(request("PUT", f"/{name}/{turn}", body=body))
                if wire.read_message()[1] != f"PUT /{name}/{turn} ".encode() + body:
                    wrong.append((name, turn))

    def by_http2():
        with http2_visitor(gateway, first=settings(s4=2**30)) as visitor:
            visitor.grant()
            stream = 1
            for turn in range(rounds):
                expected = {}
                for name in range(streams):
                    body = f"two-{name}-{turn}-".encode() * 50
                    expected[stream] = f"PUT /{name}/{turn} ".encode() + body
                    visitor.ask(stream, ("content-length", str(len(body))), method="PUT",
                                path=f"/{name}/{turn}", end=False)  # fmt: skip
                    visitor.send(frame(DATA, END_STREAM, stream, body))
                    stream += 2
                came = dict.fromkeys(expected, b"")
                left = set(expected)
                while left:
                    kind, flags, found, payload = visitor.wait_for(DATA, RST_STREAM, GOAWAY)
                    assert kind == DATA
                    came[found] += payload
                    if flags & END_STREAM:
                        left.discard(found)
                wrong.extend(key for key in expected if came[key] != expected[key])

    threads = [threading.Thread(target=by_http_1_1, args=(name,)) for name in range(streams // 2)]
    threads += [threading.Thread(target=by_http2) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_dashboard_and_metrics_count_visits_of_both_protocols(cache, tmp_path, origin):
    origin.serve(echo)
    log = tmp_path / "access.log"
    with served(cache, tmp_path, origin, ACCESS_LOG=str(log), LOG_FORMAT="json") as gateway:
        with http2_visitor(gateway) as visitor:
            visitor.ask(1)
            visitor.answer(1)
        wait_until(lambda: log.exists() and log.read_text())
        assert json.loads(log.read_text().splitlines()[0])["protocol"] == "HTTP/2.0"
