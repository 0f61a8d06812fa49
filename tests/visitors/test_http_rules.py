"""The rules of HTTP/1.1, in bytes: what a visitor sends, what happens to it, and what the target
may see; then the same for a target's answers.

The rules are RFC 9110 and RFC 9112. The gateway is one parser between two others, and adds one
rule: a message that two parsers could read differently goes no further. So most rows are known
attacks (CL.TE, TE.CL, TE.TE, CL.0, response splitting), such as a request that is one for the first
parser and two for the second. Each row passes a real gateway and its agent.

Four tables: REFUSED and PASSED are requests, BROKEN and ANSWERED are answers. Below them are cases
that no table holds: answers cut short, connections that are kept, visitors that leave.
"""

import logging
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import (
    APP,
    CUT,
    MIB,
    Wire,
    agent_here,
    answer,
    at_length,
    fields_of,
    gateway_here,
    go_agent,
    request,
    status_of,
    wait_until,
)

from gotunnel_agent.common.http1 import CHUNK_LINE_LIMIT, FIELD_LIMIT, HEAD_LIMIT, TARGET_LIMIT
from gotunnel_server.visitors import exchange

HOST = b"Host: app.localhost"
CHUNKED = b"Transfer-Encoding: chunked"
NEXT = request("GET", "/next")
# Seconds within which a target learns that its visitor has gone. The gateway needs one second, on
# a machine that has nothing else to do.
SOON = 3


@pytest.fixture
def gateway(cache, tmp_path, origin):
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, http={APP: origin.port}):
        yield gateway


def head(*lines, first=b"GET / HTTP/1.1"):
    """A head from its lines, as they are."""
    return b"\r\n".join([first, *lines, b"", b""])


def get(*lines):
    return head(HOST, *lines)


def post(*lines, body=b""):
    return head(HOST, *lines, first=b"POST / HTTP/1.1") + body


def chunked(body):
    """A request with a chunked body, as it is."""
    return post(CHUNKED, body=body)


def without_forwarding(head):
    """A head without what the gateway says about its visitor."""
    return re.sub(rb"(?i)\r\n(?:x-forwarded-[a-z]+|x-real-ip): [^\r]*", b"", head)


def error_of(head):
    """Status and code word of a page of the gateway's own."""
    code = [line[18:] for line in fields_of(head) if line.startswith("x-gotunnel-error: ")]
    return status_of(head), *code


# Requests that go no further ---------------------------------------------------------------------

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
ZERO = b"0\r\n\r\n"

REFUSED = {
    # name: (status, request). SMUGGLED follows each; no target may get it.
    # RFC 9112 §2.2: lines end in CRLF; what is not text is refused.
    "bare lf": (400, b"GET / HTTP/1.1\nHost: app.localhost\n\n"),
    "bare lf behind one field": (400, b"GET / HTTP/1.1\r\nHost: app.localhost\nA: b\r\n\r\n"),
    "bare lf as the blank line": (400, b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\n"),
    "bare cr in a value": (400, get(b"A: b\rTransfer-Encoding: chunked")),
    "bare cr as a line end": (400, b"GET / HTTP/1.1\rHost: app.localhost\r\r\n\r\n"),
    "cr cr lf": (400, b"GET / HTTP/1.1\r\r\nHost: app.localhost\r\n\r\n"),
    "nul in a value": (400, get(b"A: b\0c")),
    "nul in a name": (400, get(b"A\0: b")),
    "vertical tab": (400, get(b"A: b\x0bc")),
    "delete": (400, get(b"A: b\x7f")),
    "two empty lines first": (400, b"\r\n\r\n" + get()),
    "white space before the first field": (400, head(b" A: b", HOST)),
    "tls hello inside tls": (400, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n"),
    # RFC 9112 §3: method SP target SP version.
    "http/0.9": (400, b"GET /\r\n\r\n"),
    "no target": (400, head(HOST, first=b"GET HTTP/1.1")),
    "two spaces": (400, head(HOST, first=b"GET  / HTTP/1.1")),
    "tab for a space": (400, head(HOST, first=b"GET\t/ HTTP/1.1")),
    "space at the end": (400, head(HOST, first=b"GET / HTTP/1.1 ")),
    "space in front": (400, head(HOST, first=b" GET / HTTP/1.1")),
    "space in the target": (400, head(HOST, first=b"GET /a b HTTP/1.1")),
    "no-break space": (400, head(HOST, first=b"GET\xa0/ HTTP/1.1")),
    "version in lower case": (400, head(HOST, first=b"GET / http/1.1")),
    "version of one digit": (400, head(HOST, first=b"GET / HTTP/1")),
    "version of three digits": (400, head(HOST, first=b"GET / HTTP/1.10")),
    "another protocol": (400, head(HOST, first=b"GET / HTTPS/1.1")),
    "http/1.2": (505, head(HOST, first=b"GET / HTTP/1.2")),
    "http/2.0": (505, head(HOST, first=b"GET / HTTP/2.0")),
    "http/2 preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"),
    # RFC 9110 §9.1: a method is a token.
    "method with brackets": (400, head(HOST, first=b"G(E)T / HTTP/1.1")),
    "method with a colon": (400, head(HOST, first=b"GET: / HTTP/1.1")),
    "method of latin letters": (400, head(HOST, first=b"G\xcbT / HTTP/1.1")),
    "method in quotes": (400, head(HOST, first=b'"GET" / HTTP/1.1')),
    "no method": (400, head(HOST, first=b" / HTTP/1.1")),
    # RFC 9112 §3.2: four forms of a target.
    "fragment": (400, head(HOST, first=b"GET /a#b HTTP/1.1")),
    "relative target": (400, head(HOST, first=b"GET a HTTP/1.1")),
    "backslash for a slash": (400, head(HOST, first=b"GET \\a HTTP/1.1")),
    "target that is no UTF-8": (400, head(HOST, first=b"GET /\xe9 HTTP/1.1")),
    "control byte in the target": (400, head(HOST, first=b"GET /\x01 HTTP/1.1")),
    "asterisk for get": (400, head(HOST, first=b"GET * HTTP/1.1")),
    "absolute-form for another": (400, head(HOST, first=b"GET http://b.localhost/ HTTP/1.1")),
    "absolute-form without host": (400, head(first=b"GET http://app.localhost/ HTTP/1.1")),
    "absolute-form with userinfo": (400, head(HOST, first=b"GET http://a@app.localhost/ HTTP/1.1")),
    "absolute-form, backslash": (400, head(HOST, first=b"GET http://app.localhost\\a HTTP/1.1")),
    "absolute-form of nobody": (400, head(HOST, first=b"GET http:/// HTTP/1.1")),
    "absolute-form of ftp": (400, head(HOST, first=b"GET ftp://app.localhost/ HTTP/1.1")),
    "absolute-form of ws": (400, head(HOST, first=b"GET ws://app.localhost/ HTTP/1.1")),
    "authority-form for get": (400, head(HOST, first=b"GET app.localhost:443 HTTP/1.1")),
    "connect to a path": (400, head(HOST, first=b"CONNECT / HTTP/1.1")),
    "connect to another": (400, head(HOST, first=b"CONNECT b.localhost:22 HTTP/1.1")),
    # RFC 9112 §3.2, RFC 9110 §7.2: one Host, a hostname and perhaps a port.
    "no host": (400, head()),
    "two hosts": (400, get(b"Host: b.localhost")),
    "the same host twice": (400, get(b"host: app.localhost")),
    "empty host": (400, head(b"Host:")),
    "empty host in http/1.0": (400, head(b"Host:", first=b"GET / HTTP/1.0")),
    "two hosts in one": (400, head(b"Host: app.localhost, b.localhost")),
    "host with userinfo": (400, head(b"Host: app.localhost@b.localhost")),
    "host with a path": (400, head(b"Host: app.localhost/b")),
    "host with a scheme": (400, head(b"Host: https://app.localhost")),
    "host with a space": (400, head(b"Host: app.localhost b")),
    "host with an escape": (400, head(b"Host: app%2elocalhost")),
    "host of latin letters": (400, head(b"Host: \xe4pp.localhost")),
    "host with an empty label": (400, head(b"Host: app..localhost")),
    "host with a port that is none": (400, head(b"Host: app.localhost:4a3")),
    "host with a port too high": (400, head(b"Host: app.localhost:65536")),
    "host with two ports": (400, head(b"Host: app.localhost:1:2")),
    "folded host": (400, head(b"Host: app.localhost", b" b.localhost")),
    # RFC 9112 §5: name, colon, value; RFC 9110 §5.1: a name is a token.
    "space before the colon": (400, get(b"Content-Length : 5")),
    "tab before the colon": (400, get(b"Transfer-Encoding\t: chunked")),
    "folded value": (400, get(b"A: b", b" c")),
    "folded length": (400, post(b"Content-Length:", b"\t5", body=b"hello")),
    "folded coding": (400, post(b"Transfer-Encoding:", b" chunked", body=ZERO)),
    "no colon": (400, get(b"A")),
    "no name": (400, get(b": b")),
    "space in a name": (400, get(b"A B: c")),
    "non-ascii name": (400, get(b"\xc4: b")),
    "name in quotes": (400, get(b'"Content-Length": 5')),
    # RFC 9112 §6.3: a message has one length.
    "CL.TE": (400, post(b"Content-Length: 6", CHUNKED, body=ZERO + b"G")),
    "TE.CL": (400, post(CHUNKED, b"Content-Length: 3", body=b"1\r\nG\r\n" + ZERO)),
    "CL.TE, length 0": (400, post(b"Content-Length: 0", CHUNKED, body=ZERO)),
    "CL.CL, two lengths": (400, post(b"Content-Length: 0", b"Content-Length: 5", body=b"hello")),
    "CL.CL, the same twice": (400, post(b"Content-Length: 5", b"content-length: 5", body=b"hello")),
    "CL.CL in one line": (400, post(b"Content-Length: 5, 5", body=b"hello")),
    "length with a plus": (400, post(b"Content-Length: +5", body=b"hello")),
    "length with a minus": (400, post(b"Content-Length: -5", body=b"hello")),
    "length with a space": (400, post(b"Content-Length: 1 0", body=b"hello")),
    "length in hex": (400, post(b"Content-Length: 0x5", body=b"hello")),
    "length with an underscore": (400, post(b"Content-Length: 1_0", body=b"hello")),
    "length with a point": (400, post(b"Content-Length: 5.0", body=b"hello")),
    "length with an exponent": (400, post(b"Content-Length: 5e0", body=b"hello")),
    "length in quotes": (400, post(b'Content-Length: "5"', body=b"hello")),
    "length of superscripts": (400, post(b"Content-Length: \xb2", body=b"hello")),
    "empty length": (400, post(b"Content-Length:", body=b"hello")),
    "length of a comma": (400, post(b"Content-Length: 5,", body=b"hello")),
    "length past 64 bits": (400, post(b"Content-Length: 18446744073709551621", body=b"hello")),
    "bad length for get": (400, get(b"Content-Length: x")),
    # RFC 9112 §6.1: the coding is "chunked", once, and not in HTTP/1.0.
    "TE.TE, twice": (400, post(CHUNKED, CHUNKED, body=ZERO)),
    "TE.TE, and identity": (400, post(CHUNKED, b"Transfer-Encoding: identity", body=ZERO)),
    "TE.TE, and a cow": (400, post(CHUNKED, b"Transfer-encoding: cow", body=ZERO)),
    "TE.TE, chunked not last": (400, post(b"Transfer-Encoding: chunked, gzip", body=ZERO)),
    "TE.TE, in one line": (400, post(b"Transfer-Encoding: chunked, chunked", body=ZERO)),
    "TE.TE, identity": (400, post(b"Transfer-Encoding: identity", body=ZERO)),
    "TE.TE, xchunked": (400, post(b"Transfer-Encoding: xchunked", body=ZERO)),
    "TE.TE, in quotes": (400, post(b'Transfer-Encoding: "chunked"', body=ZERO)),
    "TE.TE, with a parameter": (400, post(b"Transfer-Encoding: chunked;a=b", body=ZERO)),
    "TE.TE, vertical tab": (400, post(b"Transfer-Encoding: \x0bchunked", body=ZERO)),
    "TE.TE, no-break space": (400, post(b"Transfer-Encoding: \xa0chunked", body=ZERO)),
    "TE.TE, line end inside": (400, post(b"Transfer-Encoding:\n chunked", body=ZERO)),
    "TE.TE, behind a bare cr": (400, post(b"A: b\rTransfer-Encoding: chunked", body=ZERO)),
    "TE.TE, comma first": (400, post(b"Transfer-Encoding: ,chunked", body=ZERO)),
    "TE.TE, comma last": (400, post(b"Transfer-Encoding: chunked,", body=ZERO)),
    "TE.TE, empty": (400, post(b"Transfer-Encoding:", body=ZERO)),
    "coding below chunked": (501, post(b"Transfer-Encoding: gzip, chunked", body=ZERO)),
    "coding in http/1.0": (400, head(HOST, CHUNKED, first=b"POST / HTTP/1.0") + ZERO),
    # RFC 9112 §7.1: the first chunk came with the head, so the target has seen nothing yet.
    "chunk size with a sign": (400, chunked(b"+5\r\nhello\r\n" + ZERO)),
    "chunk size with 0x": (400, chunked(b"0x5\r\nhello\r\n" + ZERO)),
    "chunk size with an underscore": (400, chunked(b"0_5\r\nhello\r\n" + ZERO)),
    "chunk size behind a space": (400, chunked(b" 5\r\nhello\r\n" + ZERO)),
    "chunk size before a space": (400, chunked(b"5 \r\nhello\r\n" + ZERO)),
    "chunk size past 64 bits": (400, chunked(b"10000000000000005\r\nhello\r\n" + ZERO)),
    "no chunk size": (400, chunked(b"\r\nhello\r\n" + ZERO)),
    "chunk size ends in lf": (400, chunked(b"5\nhello\r\n" + ZERO)),
    "chunk size ends in cr": (400, chunked(b"5\rhello\r\n" + ZERO)),
    "chunk ends in lf": (400, chunked(b"5\r\nhello\n" + ZERO)),
    "chunk is longer than its size": (400, chunked(b"5\r\nhello!\r\n" + ZERO)),
    "chunk is shorter than its size": (400, chunked(b"7\r\nhello\r\n" + ZERO)),
    "extension with lf": (400, chunked(b"5;a\nb\r\nhello\r\n" + ZERO)),
    "extension with bare cr": (400, chunked(b"5;a\rb\r\nhello\r\n" + ZERO)),
    "extension with nul": (400, chunked(b"5;a=\0\r\nhello\r\n" + ZERO)),
    "extension without a name": (400, chunked(b"5;\r\nhello\r\n" + ZERO)),
    "extension in an open quote": (400, chunked(b'5;a="\r\nhello\r\n' + ZERO)),
    "extension behind a comma": (400, chunked(b"5,a\r\nhello\r\n" + ZERO)),
    "last chunk ends in lf": (400, chunked(b"0\r\n\n")),
    "trailer ends in lf": (400, chunked(b"0\r\nA: b\n\r\n")),
    "folded trailer": (400, chunked(b"0\r\nA: b\r\n c\r\n\r\n")),
    "trailer with a space before the colon": (400, chunked(b"0\r\nA : b\r\n\r\n")),
    "request where trailers belong": (400, chunked(b"0\r\nGET / HTTP/1.1\r\n\r\n")),
    # Limits.
    "chunk-size line too long": (400, chunked(b"5;" + b"a" * CHUNK_LINE_LIMIT)),
    "target too long": (414, head(HOST, first=b"GET /" + b"a" * TARGET_LIMIT + b" HTTP/1.1")),
    "first line too long": (414, b"GET /" + b"a" * HEAD_LIMIT),
    "field too long": (431, get(b"A: " + b"b" * HEAD_LIMIT)),
    "too many fields": (431, get(*[b"A: b"] * FIELD_LIMIT)),
    "too many trailers": (431, chunked(b"0\r\n" + b"A: b\r\n" * (FIELD_LIMIT + 1) + b"\r\n")),
}  # fmt: skip


@pytest.mark.parametrize(("status", "sent"), REFUSED.values(), ids=REFUSED)
def test_refused_request_ends_its_connection_and_never_reaches_the_target(
    gateway, origin, status, sent
):
    with gateway.dial(APP) as visitor:
        visitor.send(sent + SMUGGLED)
        head, page = visitor.read_message()
        assert error_of(head) == (status, "malformed-request") and page
        assert "connection: close" in fields_of(head)
        assert visitor.read_to_end() == b""
    with gateway.dial(APP) as visitor:
        visitor.send(NEXT)
        target = origin.accept()
        assert target.read_head().startswith(b"GET /next ")  # and nothing before it
        target.send(answer(b"next"))
        assert visitor.read_message()[1] == b"next"


def test_connect_is_refused_and_what_follows_is_no_request(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(head(HOST, first=b"CONNECT app.localhost:22 HTTP/1.1") + SMUGGLED)
        assert error_of(visitor.read_message()[0]) == (403, "not-tcp")
        assert visitor.read_to_end() == b""
    assert origin.was_left_alone()


def test_good_requests_before_a_bad_one_are_answered(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(request("HEAD", "/1") + request("GET", "/2") + get(b"A : b") + SMUGGLED)
        target = origin.accept()
        assert target.read_head().startswith(b"HEAD /1 ")
        target.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        visitor.read_head()
        target = origin.accept()  # a new one: after HEAD none is kept
        assert target.read_head().startswith(b"GET /2 ")
        target.send(answer(b"two"))
        assert visitor.read_message()[1] == b"two"
        assert error_of(visitor.read_message()[0]) == (400, "malformed-request")
        assert visitor.read_to_end() == b""
        target.sock.settimeout(0)
        with pytest.raises(BlockingIOError):
            target.read()
    assert origin.was_left_alone()


def test_refusal_after_a_head_request_has_its_page(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(request("HEAD"))
        target = origin.accept()
        target.read_head()
        target.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        visitor.read_head()
        visitor.send(b"GET  / HTTP/1.1\r\n\r\n")
        assert visitor.read_message()[1]


def test_chunk_that_breaks_later_is_refused_and_its_body_never_ends_for_the_target(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(chunked(b"3\r\nabc\r\n"))
        target = origin.accept()
        target.read_until(b"abc\r\n")
        visitor.send(b"0\r\nContent-Length : 5\r\n\r\n" + SMUGGLED)
        assert error_of(visitor.read_message()[0]) == (400, "malformed-request")
        assert visitor.read_to_end() == b""
        assert read_until_gone(target) == b""


# Requests that are passed on ---------------------------------------------------------------------

KEPT, CLOSED = "kept", "closed"
PLAIN = b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
SIZED = b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 5\r\n\r\nhello"
IN_CHUNKS = post(CHUNKED)  # and the chunks behind it

PASSED = {
    # name: (request, what becomes of the visitor's connection, what the target sees).
    # RFC 9112 §2.2 and §5: leniency that every reader shares.
    "plain": (PLAIN, KEPT, PLAIN),
    "an empty line first": (b"\r\n" + PLAIN, KEPT, PLAIN),
    "white space around values": (get(b"A:  b \tc\t ", b"D:"), KEPT, get(b"A: b \tc", b"D: ")),
    "order and spelling": (get(b"b: 1", b"A: 2", b"B: 3"), KEPT, get(b"b: 1", b"A: 2", b"B: 3")),
    "obs-text in a value": (get(b"A: \xff\x80"), KEPT, get(b"A: \xff\x80")),
    "as many fields as may be": (get(*[b"A: b"] * (FIELD_LIMIT - 1)), KEPT,
                                 get(*[b"A: b"] * (FIELD_LIMIT - 1))),
    # RFC 9110 §9.1: methods are case-sensitive tokens, and there may be others than we know.
    "odd method": (head(HOST, first=b"!#$%&'*+-.^_`|~ / HTTP/1.1"), KEPT,
                   head(HOST, first=b"!#$%&'*+-.^_`|~ / HTTP/1.1")),
    "method in lower case": (head(HOST, first=b"get / HTTP/1.1"), KEPT,
                             head(HOST, first=b"get / HTTP/1.1")),
    # RFC 9112 §3.2: the target hears its own form.
    "absolute-form": (head(HOST, first=b"GET HTTP://App.localhost:80/a?b HTTP/1.1"), KEPT,
                      head(HOST, first=b"GET /a?b HTTP/1.1")),
    "absolute-form of all": (head(HOST, first=b"OPTIONS http://app.localhost HTTP/1.1"), KEPT,
                             head(HOST, first=b"OPTIONS * HTTP/1.1")),
    "asterisk-form": (head(HOST, first=b"OPTIONS * HTTP/1.1"), KEPT,
                      head(HOST, first=b"OPTIONS * HTTP/1.1")),
    "two slashes": (head(HOST, first=b"GET //b.localhost/ HTTP/1.1"), KEPT,
                    head(HOST, first=b"GET //b.localhost/ HTTP/1.1")),
    "what is escaped stays so": (head(HOST, first=b"GET /%2e%2E/%00?%0d%0a HTTP/1.1"), KEPT,
                                 head(HOST, first=b"GET /%2e%2E/%00?%0d%0a HTTP/1.1")),
    "longest target": (head(HOST, first=b"GET /" + b"a" * (TARGET_LIMIT - 1) + b" HTTP/1.1"), KEPT,
                       head(HOST, first=b"GET /" + b"a" * (TARGET_LIMIT - 1) + b" HTTP/1.1")),
    # HTTP/1.0 (RFC 9112 §9.3, RFC 9110 §7.8): no Host, no upgrade, ends unless it asks not.
    "http/1.0": (b"GET / HTTP/1.0\r\n\r\n", CLOSED, PLAIN),
    "http/1.0, kept": (head(HOST, b"Connection: Keep-Alive", first=b"GET / HTTP/1.0"), KEPT, PLAIN),
    "http/1.0, absolute": (b"GET http://app.localhost/a HTTP/1.0\r\n\r\n", CLOSED,
                           head(HOST, first=b"GET /a HTTP/1.1")),
    "http/1.0, upgrade": (head(HOST, b"Connection: Upgrade", b"Upgrade: chat",
                               first=b"GET / HTTP/1.0"), CLOSED, PLAIN),
    # RFC 9110 §7.6.1: what concerns one connection.
    "close": (get(b"Connection: close"), CLOSED, PLAIN),
    "close among others": (get(b"Connection: a, CLOSE", b"A: b"), CLOSED, PLAIN),
    "close, in a later line": (get(b"Connection: a", b"Connection: close"), CLOSED, PLAIN),
    "hop by hop": (get(b"TE: trailers", b"Keep-Alive: 5", b"Proxy-Connection: close",
                       b"Proxy-Authorization: x", b"Upgrade: chat", b"HTTP2-Settings: x"), KEPT,
                   PLAIN),
    "connection names a field": (get(b"Connection: x-a, X-B", b"X-A: 1", b"x-b: 2"), KEPT, PLAIN),
    "connection names host": (get(b"Connection: host, cookie", b"Cookie: a=b"), KEPT,
                              get(b"Cookie: a=b")),
    "connection names the length": (post(b"Connection: content-length", b"Content-Length: 5",
                                         body=b"hello"), KEPT, SIZED),
    "framing with underscores": (get(b"Content_Length: 5", b"transfer_encoding: chunked"), KEPT,
                                 PLAIN),
    "framing with other characters": (
        get(b"Content.Length: 5", b"Transfer~Encoding: chunked", b"TE: x", b"Keep!Alive: 5"), KEPT,
        PLAIN),
    "who visits, with other characters": (
        get(b"X.Forwarded.For: 192.0.2.1", b"X~Real-IP: 192.0.2.1", b"x-real!ip: 192.0.2.1",
            b"X#Forwarded|Proto: http", b"X'Forwarded-Host: b"), KEPT, PLAIN),
    "who visits, with underscores": (get(b"X_Forwarded_For: 192.0.2.1", b"x_real-ip: 192.0.2.1"),
                                     KEPT, PLAIN),
    # RFC 9112 §6: framing is written anew.
    "length": (post(b"content-length:005", body=b"hello"), KEPT, SIZED),
    "length of 0": (post(b"Content-Length: 0"), KEPT, post(b"Content-Length: 0")),
    "length of 0 for get": (get(b"Content-Length: 0"), KEPT, get(b"Content-Length: 0")),
    "CL.0, body of a get": (get(b"Content-Length: 5") + b"GET /", KEPT,
                            get(b"Content-Length: 5") + b"GET /"),
    "coding in any case": (post(b"transfer-encoding:\tCHUNKED ", body=ZERO), KEPT,
                           IN_CHUNKS + ZERO),
    "chunk sizes": (chunked(b"0005\r\nhello\r\n0A\r\n0123456789\r\n000\r\n\r\n"), KEPT,
                    IN_CHUNKS + b"5\r\nhello\r\na\r\n0123456789\r\n" + ZERO),
    "extensions": (chunked(b'5 ; a=b;c="\\"\xff";d\r\nhello\r\n0;e\r\n\r\n'), KEPT,
                   IN_CHUNKS + b"5\r\nhello\r\n" + ZERO),
    "line ends in a chunk": (chunked(b"7\r\n\r\n0\r\n\r\n\r\n" + ZERO), KEPT,
                             IN_CHUNKS + b"7\r\n\r\n0\r\n\r\n\r\n" + ZERO),
    "trailers": (chunked(b"0\r\nX-Sum:  1\r\n\r\n"), KEPT, IN_CHUNKS + b"0\r\nX-Sum: 1\r\n\r\n"),
    "trailers that come too late": (
        chunked(b"0\r\nContent-Length: 5\r\nHost: b\r\nTransfer-Encoding: x\r\nCookie: a\r\n"
                b"X-Forwarded-For: 1\r\nTransfer_Encoding: x\r\nX: y\r\n\r\n"), KEPT,
        IN_CHUNKS + b"0\r\nX: y\r\n\r\n"),
    # RFC 9110 §10.1.1: what else is expected is the target's to refuse.
    "expect something else": (get(b"Expect: the-unexpected"), KEPT, get(b"Expect: the-unexpected")),
    # RFC 9110 §7.8
    "upgrade": (get(b"Connection: upgrade", b"Upgrade: chat/2"), KEPT,
                get(b"Upgrade: chat/2", b"Connection: Upgrade")),
    "upgrade that connection does not name": (get(b"Upgrade: chat"), KEPT, PLAIN),
    "upgrade to nothing": (get(b"Connection: upgrade", b"Upgrade: ,"), KEPT, PLAIN),
    "upgrade with a body": (post(b"Connection: upgrade", b"Upgrade: chat", b"Content-Length: 5",
                                 body=b"hello"), KEPT,
                            post(b"Upgrade: chat", b"Connection: Upgrade", b"Content-Length: 5",
                                 body=b"hello")),
    "upgrade to h2c": (get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c",
                           b"HTTP2-Settings: x"), KEPT, PLAIN),
    "upgrade to h2c among others": (get(b"Connection: Upgrade", b"Upgrade: chat, H2C"), KEPT,
                                    PLAIN),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "fate", "seen"), PASSED.values(), ids=PASSED)
def test_request_is_passed_on_in_exactly_these_bytes(gateway, origin, sent, fate, seen):
    expected_head, end, expected_body = seen.partition(b"\r\n\r\n")
    with gateway.dial(APP) as visitor:
        visitor.send(sent + NEXT)
        target = origin.accept()
        assert without_forwarding(target.read_head()) == expected_head + end
        assert target.read_exactly(len(expected_body)) == expected_body
        target.send(answer(b"first", "Connection: close"))
        assert read_until_gone(target) == b""
        head, body = visitor.read_message()
        assert (status_of(head), body) == (200, b"first")
        assert ("connection: close" in fields_of(head)) is (fate == CLOSED)
        if fate == CLOSED:
            assert visitor.read_to_end() == b"" and origin.was_left_alone()
        else:
            target = origin.accept()
            assert without_forwarding(target.read_head()) == NEXT
            target.send(answer(b"second"))
            assert visitor.read_message()[1] == b"second"


def read_until_gone(wire):
    """What still comes, until the other side has closed or reset the connection."""
    try:
        return wire.read_to_end()
    except ConnectionResetError:
        return b""


# Answers that are passed on ----------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK"

ANSWERED = {
    # name: (request line, answer, what the visitor sees, whether another request may follow it on
    # the same connection to the target). "$" ends the target's connection.
    "length": (b"GET / HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
               b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
    "no reason": (b"GET / HTTP/1.1", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
                  b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", True),
    "chunks": (b"GET / HTTP/1.1",
               b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n02;a=b\r\nok\r\n000\r\n\r\n",
               b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", True),
    "trailers": (b"GET / HTTP/1.1",
                 b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                 b"0\r\nA: b\r\nSet-Cookie: c\r\nContent-Length: 9\r\n\r\n",
                 b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n\r\n", True),
    "until close": (b"GET / HTTP/1.1", b"HTTP/1.1 200 OK\r\n\r\nok$",
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
                    False),
    "until close, of nothing": (
        b"GET / HTTP/1.1", b"HTTP/1.1 200 OK\r\n\r\n$",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
    # Answers that break a rule but have one meaning only: written anew, and the stream is not kept.
    "lf": (b"GET / HTTP/1.1", b"HTTP/1.1 200 OK\nA: b\nContent-Length: 2\n\nok",
           b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 2\r\n\r\nok", False),
    "lf behind crlf": (b"GET / HTTP/1.1", b"HTTP/1.1 200 OK\r\nA: b\nContent-Length: 2\n\nok",
                       b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 2\r\n\r\nok", False),
    "lf in an interim one": (
        b"GET / HTTP/1.1", b"HTTP/1.1 103 Early Hints\nA: b\n\n" + answer(b"ok"),
        b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
    "folded value": (
        b"GET / HTTP/1.1", head(b"A: b", b"\t c", b"Content-Length: 2", first=OK) + b"ok",
        head(b"A: b c", b"Content-Length: 2", first=OK) + b"ok", False),
    "the same length twice": (
        b"GET / HTTP/1.1",
        head(b"Content-Length: 2", b"A: b", b"Content-Length: 2", first=OK) + b"ok",
        head(b"A: b", b"Content-Length: 2", first=OK) + b"ok", False),
    "the same length twice in a line": (
        b"GET / HTTP/1.1", head(b"Content-Length: 2, 2", first=OK) + b"ok",
        head(b"Content-Length: 2", first=OK) + b"ok", False),
    "the same length twice for head": (
        b"HEAD / HTTP/1.1", head(b"Content-Length: 2, 2", first=OK),
        head(b"Content-Length: 2", first=OK), False),
    "length and chunks": (
        b"GET / HTTP/1.1", head(b"Content-Length: 9", CHUNKED, first=OK) + b"2\r\nok\r\n" + ZERO,
        head(CHUNKED, first=OK) + b"2\r\nok\r\n" + ZERO, False),
    "padded chunk sizes": (
        b"GET / HTTP/1.1", head(CHUNKED, first=OK) + b"2   \r\nok\r\n0 \r\n\r\n",
        head(CHUNKED, first=OK) + b"2\r\nok\r\n" + ZERO, False),
    "lf in chunk lines": (
        b"GET / HTTP/1.1", head(CHUNKED, first=OK) + b"2\nok\n0\nA: b\n\n",
        head(CHUNKED, first=OK) + b"2\r\nok\r\n0\r\nA: b\r\n\r\n", False),
    "status of 600": (
        b"GET / HTTP/1.1", head(b"Content-Length: 2", first=b"HTTP/1.1 600 X") + b"ok",
        head(b"Content-Length: 2", first=b"HTTP/1.1 600 X") + b"ok", False),
    "status of 999": (
        b"GET / HTTP/1.1", head(b"Content-Length: 2", first=b"HTTP/1.1 999 X") + b"ok",
        head(b"Content-Length: 2", first=b"HTTP/1.1 999 X") + b"ok", False),
    "close": (b"GET / HTTP/1.1",
              b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
              b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
    "http/1.0": (b"GET / HTTP/1.1", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
                 b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
    "http/1.0, kept": (b"GET / HTTP/1.1",
                       b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 2\r\n\r\nok",
                       b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
    "hop by hop": (b"GET / HTTP/1.1",
                   b"HTTP/1.1 200 OK\r\nKeep-Alive: 5\r\nUpgrade: h2\r\nConnection: A, Upgrade\r\n"
                   b"A: b\r\nProxy-Authenticate: x\r\nSet-Cookie: c\r\nset-cookie: d\r\n"
                   b"Content-Length: 0\r\n\r\n",
                   b"HTTP/1.1 200 OK\r\nSet-Cookie: c\r\nset-cookie: d\r\n"
                   b"Content-Length: 0\r\n\r\n", True),
    # RFC 9112 §6.3: no body, whatever the fields say. Some targets send one, perhaps later.
    "head": (b"HEAD / HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
             b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", False),
    "head, chunked": (b"HEAD / HTTP/1.1", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                      b"HTTP/1.1 200 OK\r\n\r\n", False),
    "204": (b"GET / HTTP/1.1", b"HTTP/1.1 204 No Content\r\nContent-Length: 9\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\n\r\n", False),
    "304": (b"GET / HTTP/1.1", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
            b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", False),
    # Bytes behind an answer belong to no request.
    "head with a body": (b"HEAD / HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
                         b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", False),
    "204 with a body": (b"GET / HTTP/1.1", b"HTTP/1.1 204 No Content\r\n\r\n0\r\n\r\n",
                        b"HTTP/1.1 204 No Content\r\n\r\n", False),
    "304 with a body": (b"GET / HTTP/1.1", b"HTTP/1.1 304 Not Modified\r\n\r\nok",
                        b"HTTP/1.1 304 Not Modified\r\n\r\n", False),
    "longer than its length": (b"GET / HTTP/1.1",
                               b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokay",
                               b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
    "two answers": (b"GET / HTTP/1.1", answer(b"ok") + answer(b"not asked for"), answer(b"ok"),
                    False),
    "two chunked bodies": (
        b"GET / HTTP/1.1",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", False),
    # RFC 9110 §15.2: interim answers, as many as come.
    "interim": (b"GET / HTTP/1.1",
                b"HTTP/1.1 103 Early Hints\r\nLink: a\r\nConnection: x\r\n\r\n"
                b"HTTP/1.1 102 Processing\r\n\r\n" + answer(b"ok"),
                b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
                + answer(b"ok"), True),
    "interim with a length": (b"GET / HTTP/1.1",
                              b"HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n"
                              + answer(b"ok"),
                              b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer(b"ok"), True),
    "upgrade required": (b"GET / HTTP/1.1",
                         answer(b"", "Upgrade: chat", status="426 Upgrade Required"),
                         b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: chat\r\n"
                         b"Connection: Upgrade\r\nContent-Length: 0\r\n\r\n", True),
    # HTTP/1.0 visitors know no chunks and no interim answers.
    "1.0, length": (b"GET / HTTP/1.0", answer(b"ok"),
                    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok$", True),
    "1.0, chunks": (
        b"GET / HTTP/1.0",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nA: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok$", True),
    "1.0, interim": (b"GET / HTTP/1.0", b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer(b"ok"),
                     b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok$", True),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "sent", "seen", "reused"), ANSWERED.values(), ids=ANSWERED)
def test_answer_is_passed_on_in_exactly_these_bytes(gateway, origin, asked, sent, seen, reused):
    visitor, target = asked_for(gateway, origin, head(HOST, first=asked))
    with visitor:
        answer_with(target, sent)
        assert visitor.read_exactly(len(seen.removesuffix(b"$"))) == seen.removesuffix(b"$")
        if seen.endswith(b"$"):
            assert visitor.read_to_end() == b""
    if reused:
        wait_until(lambda: kept_streams(gateway))
    with gateway.dial(APP) as visitor:
        visitor.send(NEXT)
        again = target if reused else origin.accept()
        assert again.read_head().startswith(b"GET /next ")
        again.send(answer(b"next"))
        assert visitor.read_message()[1] == b"next"
    if not reused:
        assert read_until_gone(target) == b""


def asked_for(gateway, origin, sent):
    """A visitor, and the target that has read the head of its request."""
    visitor = gateway.dial(APP)
    visitor.send(sent)
    target = origin.accept()
    target.read_head()
    return visitor, target


def answer_with(target, sent):
    target.send(sent.removesuffix(b"$"))
    if sent.endswith(b"$"):
        target.finish()


# Answers that are broken -------------------------------------------------------------------------

BROKEN = {
    "another protocol": head(first=b"ICY 200 OK"),
    "no head": b"hello\r\n\r\n",
    "http/0.9": b"<html>hello</html>\r\n\r\n",
    "http/2.0": head(first=b"HTTP/2.0 200 OK"),
    "http/1.2": head(first=b"HTTP/1.2 200 OK"),
    "empty line first": b"\r\n" + answer(),
    "status of two digits": head(first=b"HTTP/1.1 20 OK"),
    "status of four digits": head(first=b"HTTP/1.1 2000 OK"),
    "status of 0": head(first=b"HTTP/1.1 000 OK"),
    "no status": head(first=b"HTTP/1.1"),
    "two spaces": head(first=b"HTTP/1.1  200 OK"),
    "bare cr": head(b"A: b\rContent-Length: 0", first=OK),
    "nul": head(b"A: \0", first=OK),
    "space before the colon": head(b"Content-Length : 2", first=OK) + b"ok",
    "no colon": head(b"A", first=OK),
    "two lengths": head(b"Content-Length: 2", b"Content-Length: 3", first=OK) + b"ok",
    "two lengths in one line": head(b"Content-Length: 2, 3", first=OK) + b"ok",
    "folded length": head(b"Content-Length:", b" 2", first=OK) + b"ok",
    "folded coding": head(b"Transfer-Encoding:", b" chunked", first=OK) + ZERO,
    "folded blank line": head(b"A: b", b" ", b"Content-Length: 2", first=OK) + b"ok",
    "bad length and coding": head(b"Content-Length: x", CHUNKED, first=OK) + ZERO,
    "length and coding in http/1.0": head(b"Content-Length: 2", CHUNKED,
                                          first=b"HTTP/1.0 200 OK") + ZERO,
    "length with a plus": head(b"Content-Length: +2", first=OK) + b"ok",
    "length with a minus": head(b"Content-Length: -2", first=OK) + b"ok",
    "coding twice": head(CHUNKED, CHUNKED, first=OK) + ZERO,
    "coding unknown": head(b"Transfer-Encoding: gzip, chunked", first=OK) + ZERO,
    "coding in http/1.0": head(CHUNKED, first=b"HTTP/1.0 200 OK") + ZERO,
    "bad length of a 204": head(b"Content-Length: x", first=b"HTTP/1.1 204 No Content"),
    "bad length of a 304": head(b"Content-Length: 1, 2", first=b"HTTP/1.1 304 Not Modified"),
    "head too large": head(b"A: " + b"b" * HEAD_LIMIT, first=OK),
    "first line too long": OK + b"K" * HEAD_LIMIT + b"\r\n\r\n",
    "too many fields": head(*[b"A: b"] * (FIELD_LIMIT + 1), first=OK),
    "101 unasked": head(b"Connection: Upgrade", b"Upgrade: chat", first=b"HTTP/1.1 101 Go"),
    "broken behind an interim one": head(first=b"HTTP/1.1 103 Early Hints") + b"hello\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_broken_answer_is_a_502_and_its_target_is_hung_up_on(gateway, origin, sent):
    visitor, target = asked_for(gateway, origin, get())
    with visitor:
        target.send(sent)
        head, page = visitor.read_message()
        if status_of(head) == 103:
            head, page = visitor.read_message()
        assert error_of(head) == (502, "bad-answer") and page
        assert read_until_gone(target) == b""
        visitor.send(NEXT)  # the visitor's own connection can go on
        target = origin.accept()
        assert target.read_head().startswith(b"GET /next ")
        target.send(answer(b"next"))
        assert visitor.read_message()[1] == b"next"


def test_words_of_a_target_that_speaks_no_http_are_for_the_log_alone(gateway, origin, caplog):
    """The greeting of such a server may tell what visitors must not learn."""
    caplog.set_level(logging.INFO)
    visitor, target = asked_for(gateway, origin, get())
    with visitor:
        target.send(b"220 mail.internal.example ESMTP\r\n\r\n")
        head, page = visitor.read_message()
    assert error_of(head) == (502, "bad-answer")
    assert b"mail.internal" not in head + page and b"The site&#x27;s answer is broken" in page
    assert "mail.internal.example ESMTP" in caplog.text


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_interim_answers_without_end_are_a_502(gateway, origin, version):
    visitor, target = asked_for(gateway, origin, head(HOST, first=b"GET / " + version))
    with visitor:
        interim = head(b"Link: " + b"a" * 1000, first=b"HTTP/1.1 103 Early Hints")
        target.send(interim * (2 * HEAD_LIMIT // len(interim)))
        heads = [visitor.read_head()]
        while status_of(heads[-1]) == 103:
            heads.append(visitor.read_head())
        assert error_of(heads[-1]) == (502, "bad-answer")
        assert sum(map(len, heads[:-1])) <= HEAD_LIMIT
        assert read_until_gone(target) == b""


IN_CHUNKS_OK = head(CHUNKED, first=OK)

CUT_SHORT = {
    "short of its length": head(b"Content-Length: 9", first=OK) + b"not all$",
    "no last chunk": IN_CHUNKS_OK + b"3\r\nall\r\n$",
    "chunk cut": IN_CHUNKS_OK + b"9\r\nnot all$",
    "chunk size cut": IN_CHUNKS_OK + b"3\r\nall\r\n5$",
    "trailers cut": IN_CHUNKS_OK + b"3\r\nall\r\n0\r\nA: b\r\n$",
    "chunk size is none": IN_CHUNKS_OK + b"3\r\nall\r\nx\r\n",
    "chunk size with a sign": IN_CHUNKS_OK + b"3\r\nall\r\n+0\r\n\r\n",
    "chunk size past 64 bits": IN_CHUNKS_OK + b"10000000000000000\r\n",
    "chunk longer than its size": IN_CHUNKS_OK + b"2\r\nall\r\n0\r\n\r\n",
    "chunk ends in nothing": IN_CHUNKS_OK + b"3\r\nall0\r\n\r\n",
    "chunk ends in cr": IN_CHUNKS_OK + b"3\r\nall\r0\r\n\r\n",
    "first chunk size is none": IN_CHUNKS_OK + b"all\r\n",
    "trailer is none": IN_CHUNKS_OK + b"0\r\nall\r\n\r\n",
    "trailers too large": IN_CHUNKS_OK + b"0\r\nA: " + b"b" * HEAD_LIMIT,
}  # fmt: skip


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
@pytest.mark.parametrize("sent", CUT_SHORT.values(), ids=CUT_SHORT)
def test_body_that_breaks_never_looks_whole(gateway, origin, sent, version):
    visitor, target = asked_for(gateway, origin, head(HOST, first=b"GET / " + version))
    with visitor:
        body = sent.index(b"\r\n\r\n") + 4
        target.send(sent[:body])
        answer_with(target, sent[body:])
        with pytest.raises(CUT):
            visitor.read_to_end()
        assert read_until_gone(target) == b""


# Connections to targets that are kept ------------------------------------------------------------


def kept_streams(gateway):
    """The idle streams that wait for another request."""
    [tunnel] = gateway.inner.tunnels.registered()
    return [stream for _, stream in tunnel._kept._by_hostname.get(APP, ())]


def test_stream_that_carried_a_body_is_not_kept(gateway, origin):
    """CL.0: a target that ignores a body would take it for the next request, and the next visitor
    would get the answer to that."""
    with gateway.dial(APP) as attacker:
        attacker.send(request("POST", "/static", body=SMUGGLED))
        careless = origin.accept()
        careless.read_head()
        careless.send(answer(b"static"))
        assert attacker.read_message()[1] == b"static"
    with gateway.dial(APP) as visitor:
        visitor.send(NEXT)
        target = origin.accept()
        assert target.read_head().startswith(b"GET /next ")
        target.send(answer(b"next"))
        assert visitor.read_message()[1] == b"next"
    careless.read_until(b"GET /smuggled ")


def test_bytes_that_come_behind_an_answer_later_spoil_its_connection(gateway, origin):
    visitor, target = asked_for(gateway, origin, get())
    with visitor:
        target.send(answer(b"ok"))
        assert visitor.read_message()[1] == b"ok"
        [stream] = wait_until(lambda: kept_streams(gateway))
        target.send(answer(b"not asked for"))
        wait_until(lambda: not stream.quiet)
        visitor.send(NEXT)
        fresh = origin.accept()
        assert fresh.read_head().startswith(b"GET /next ")
        fresh.send(answer(b"next"))
        assert visitor.read_message()[1] == b"next"


@pytest.mark.parametrize("count", [1, 3])
def test_request_is_sent_at_most_twice(gateway, origin, count):
    """However many streams are kept. Otherwise a request that crashes its target would crash it
    again and again."""
    visitors = [asked_for(gateway, origin, get()) for _ in range(count)]
    for number, (visitor, target) in enumerate(visitors, 1):
        target.send(answer(b"ok"))
        visitor.read_message()
        wait_until(lambda number=number: len(kept_streams(gateway)) == number)
    with gateway.dial(APP) as visitor:
        visitor.send(request("GET", "/deadly"))
        visitors[-1][1].read_until(b"GET /deadly ")
        visitors[-1][1].close()
        fresh = origin.accept()
        fresh.read_until(b"GET /deadly ")
        fresh.close()
        assert error_of(visitor.read_message()[0]) == (502, "no-answer")
        assert origin.was_left_alone()
    for _, target in visitors[:-1]:
        target.sock.settimeout(0)
        with pytest.raises(BlockingIOError):
            target.read()
    for visitor, _ in visitors:
        visitor.close()


@pytest.mark.parametrize("method", ["POST", "PATCH", "LOCK", "get"])
def test_what_may_not_be_repeated_goes_over_a_new_connection(gateway, origin, method):
    visitor, kept = asked_for(gateway, origin, get())
    with visitor:
        kept.send(answer(b"ok"))
        visitor.read_message()
        visitor.send(request(method, "/once"))
        target = origin.accept()
        assert target.read_head().startswith(b"%b /once " % method.encode())
        target.close()
        assert error_of(visitor.read_message()[0]) == (502, "no-answer")
        assert origin.was_left_alone()


def test_answer_that_has_begun_is_not_asked_for_again(gateway, origin):
    visitor, kept = asked_for(gateway, origin, get())
    with visitor:
        kept.send(answer(b"ok"))
        visitor.read_message()
        visitor.send(NEXT)
        kept.read_head()
        kept.send(b"HTTP/1.1 2")
        kept.close()
        assert error_of(visitor.read_message()[0]) == (502, "no-answer")
        assert origin.was_left_alone()


# Each visitor gets its own answers ---------------------------------------------------------------

VISITORS = 50
LENGTHS = [20, at_length(200)]


def moody_echo(target):
    """Echoes the request. Now and then it does what targets do: it answers late or in chunks, or it
    closes after a complete answer, announced or not."""
    while True:
        head, body = target.read_message()
        mood = random.random()
        said = head.split(b" ")[1] + b" " + body
        if mood < 0.1:
            time.sleep(random.random() / 50)
        if mood > 0.9:
            target.send(answer(said, "Connection: close"))
            return
        if mood > 0.5:
            target.send(head_in_chunks(said))
        else:
            target.send(answer(said))
        if 0.1 < mood < 0.2:
            return


def head_in_chunks(body):
    half = len(body) // 2 + 1
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part]
    return IN_CHUNKS_OK + b"".join(chunks) + ZERO


def visit_many(gateway, visits):
    """Many visitors at a time, each of whom must get its own answers."""

    def visit(name):
        with gateway.visitor(APP) as visitor:
            for number in range(visits):
                path = f"/{name}/{number}"
                body = random.Random(path).randbytes(number % 10 * 400) if number % 3 else None
                method = ("GET", "PUT", "POST")[number % 3]
                visitor.request(method, path, body)
                response = visitor.getresponse()
                expected = path.encode() + b" " + (body or b"")
                assert (response.status, response.read()) == (200, expected)
        return name

    with ThreadPoolExecutor(VISITORS) as pool:
        assert list(pool.map(visit, range(VISITORS))) == list(range(VISITORS))


@pytest.mark.parametrize("visits", LENGTHS)
def test_no_visitor_gets_the_answer_of_another(gateway, origin, visits):
    origin.serve(moody_echo)
    visit_many(gateway, visits)


@pytest.mark.parametrize("visits", LENGTHS)
def test_no_visitor_gets_the_answer_of_another_by_a_go_agent(gopeer, cache, origin, visits):
    origin.serve(moody_echo)
    with gateway_here(cache) as gateway, go_agent(gopeer, gateway, http={APP: origin.port}):
        gateway.wait_for_routes(APP)
        visit_many(gateway, visits)


# Visitors that leave -----------------------------------------------------------------------------

LEAVE = pytest.mark.parametrize("leave", [Wire.close, Wire.reset])


def assert_gone(target):
    """The target soon sees that its connection is closed."""
    target.sock.settimeout(SOON)
    read_until_gone(target)


def test_gateway_looks_often_enough_for_its_visitors():
    assert exchange.WATCH <= 0.5


@LEAVE
@pytest.mark.parametrize("behind", [b"", NEXT], ids=["alone", "pipelined"])
def test_target_learns_that_a_waiting_visitor_has_gone(gateway, origin, leave, behind):
    visitor, target = asked_for(gateway, origin, get() + behind)
    leave(visitor)
    assert_gone(target)


@LEAVE
def test_target_learns_that_a_visitor_has_left_a_silent_download(gateway, origin, leave):
    visitor, target = asked_for(gateway, origin, get())
    target.send(IN_CHUNKS_OK + b"3\r\nall\r\n")
    visitor.read_until(b"all\r\n")
    leave(visitor)
    assert_gone(target)


@LEAVE
def test_target_learns_that_a_visitor_has_left_a_running_download(gateway, origin, leave):
    visitor, target = asked_for(gateway, origin, get())
    target.send(head(b"Content-Length: 1000000000000", first=OK))
    visitor.read_head()
    target.send(bytes(MIB))
    visitor.read()
    leave(visitor)
    target.sock.settimeout(SOON)
    with pytest.raises(ConnectionError):
        while True:
            target.send(bytes(MIB))


@LEAVE
def test_target_learns_that_a_visitor_has_left_a_running_upload(gateway, origin, leave):
    visitor, target = asked_for(gateway, origin, post(b"Content-Length: 1000000000000"))
    visitor.send(bytes(MIB))
    target.read()
    leave(visitor)
    assert_gone(target)


@LEAVE
def test_target_that_does_not_read_learns_that_the_visitor_has_left(gateway, origin, leave):
    visitor, target = asked_for(gateway, origin, post(b"Content-Length: 1000000000000"))
    visitor.sock.settimeout(0.2)  # by then all buffers on the way are full
    with pytest.raises(TimeoutError):
        while True:
            visitor.send(bytes(MIB))
    leave(visitor)
    assert_gone(target)
