"""http mode, end to end: a visitor, the gateway, its agent and a target, all in this process."""

import contextlib
import hashlib
import random
import select
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import (
    APP,
    CUT,
    GATEWAY_HOST,
    MIB,
    RAW,
    TIMEOUT,
    Wire,
    agent_here,
    answer,
    dial_tls,
    fields_of,
    gateway_here,
    request,
    reserved_port,
    routes_of,
    status_of,
    tls_context,
    wait_until,
)

from gotunnel import StreamReset
from gotunnel_server.agents import tunnel as tunnel_module
from gotunnel_server.net import listener
from gotunnel_server.visitors import connection

# Seconds within which a target must learn that its visitor has gone: the gateway looks twice a
# second, and this machine may be busy.
SOON = 5


@pytest.fixture
def gateway(cache, tmp_path, origin):
    """A gateway whose agent serves APP, in http mode, and RAW, in tcp mode, from the origin."""
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, **ports):
        yield gateway


@contextlib.contextmanager
def served_with(cache, tmp_path, origin, **changes):
    """The same, APP alone, by a gateway with a changed environment."""
    with gateway_here(cache, **changes) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            yield gateway


@pytest.fixture
def quick_sweeps(monkeypatch):
    """Listeners look at their deadlines at once, so that short timeouts take no second."""
    monkeypatch.setattr(listener, "SWEEP", 0.05)


def begin(gateway, origin, *fields, method="GET"):
    """A visit up to the point where the target has read the request's head."""
    visitor = gateway.dial(APP)
    visitor.send(request(method, "/", *fields))
    target = origin.accept()
    head = target.read_head()
    return visitor, target, head


def visit_once(visitor, origin, path="/"):
    """A whole visit on an open connection; the target's connection is left open."""
    visitor.send(request("GET", path))
    target = origin.accept()
    target.read_head()
    target.send(answer(path.encode()))
    assert visitor.read_message()[1] == path.encode()
    return target


def digest(body):
    return hashlib.sha256(body).hexdigest().encode()


# What goes to the target, and what comes back ----------------------------------------------------


def test_get(gateway, origin):
    with gateway.visitor(APP) as visitor:
        visitor.request("GET", "/a/b?c=d", headers={"X-Own": "kept"})
        target = origin.accept()
        head = target.read_head()
        target.send(answer(b"hello", "X-Target: kept too"))
        response = visitor.getresponse()
        assert head.startswith(b"GET /a/b?c=d HTTP/1.1\r\n")
        assert {"host: app.localhost", "x-own: kept"} <= set(fields_of(head))
        assert (response.status, response.read()) == (200, b"hello")
        assert response.getheader("X-Target") == "kept too"


@pytest.mark.parametrize("size", [1, 1000, 10 * MIB])
@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_post_arrives_whole_and_framed_as_it_was_sent(gateway, origin, size, framing):
    body = random.Random(size).randbytes(size)
    chunked = framing == "chunked"
    heads = []

    def script(target):
        head, came = target.read_message()
        heads.append(head)
        target.send(answer(digest(came)))

    origin.serve(script)
    with gateway.visitor(APP) as visitor:
        pieces = [body[at : at + 50_000] for at in range(0, size, 50_000)]
        visitor.request(
            "POST", "/", iter(pieces) if chunked else body,
            {"Transfer-Encoding": "chunked"} if chunked else {}, encode_chunked=chunked,
        )  # fmt: skip
        assert visitor.getresponse().read() == digest(body)
    framed = "transfer-encoding: chunked" if chunked else f"content-length: {size}"
    assert framed in fields_of(heads[0])


def test_large_answer_arrives_whole(gateway, origin):
    body = random.Random(1).randbytes(10 * MIB)
    origin.serve(lambda target: [target.read_head(), target.send(answer(body))])
    with gateway.visitor(APP) as visitor:
        visitor.request("GET", "/")
        assert digest(visitor.getresponse().read()) == digest(body)


def test_a_session_ticket_does_not_wait_for_the_request(gateway):
    """The visitor's kernel may hold its request back until it has a packet of ours (Nagle)."""
    with gateway.dial(APP) as visitor:
        wait = TIMEOUT / 4  # less than HEADER_TIMEOUT, when the ticket leaves with a page
        assert select.select([visitor.sock], [], [], wait)[0]


@pytest.mark.parametrize(
    ("method", "reply", "expected"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", "content-length: 5000"),
        ("GET", b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n", "x-a: b"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\nETag: x\r\n\r\n", "etag: x"),
    ],
)
def test_answer_without_body_leaves_the_connection_in_step(
    gateway, origin, method, reply, expected
):
    with gateway.dial(APP) as visitor:
        visitor.send(request(method))
        target = origin.accept()
        target.read_head()
        target.send(reply)
        assert expected in fields_of(visitor.read_head())
        visitor.send(request("GET", "/next"))
        target = origin.accept()  # the other connection might still bring a body
        assert target.read_head().startswith(b"GET /next ")
        target.send(answer(b"in step"))
        assert visitor.read_message()[1] == b"in step"


def test_interim_answers_are_passed_on_before_the_final_one(gateway, origin):
    visitor, target, _ = begin(gateway, origin)
    with visitor:
        target.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n")
        assert status_of(early := visitor.read_head()) == 103
        assert "link: </a.css>" in fields_of(early)
        target.send(answer(b"final"))
        assert visitor.read_message()[1] == b"final"


def test_expect_continue_holds_the_body_back_until_the_target_wants_it(gateway, origin):
    visitor, target, head = begin(
        gateway, origin, "Content-Length: 4", "Expect: 100-continue", method="POST"
    )
    with visitor:
        assert "expect: 100-continue" in fields_of(head)
        target.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert status_of(visitor.read_head()) == 100
        visitor.send(b"body")
        assert target.read_exactly(4) == b"body"
        target.send(answer(b"thanks"))
        assert visitor.read_message()[1] == b"thanks"


def test_http_1_0_visitor_gets_an_answer_that_ends_with_its_connection(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(b"GET / HTTP/1.0\r\n\r\n")
        target = origin.accept()
        head = target.read_head()
        assert head.startswith(b"GET / HTTP/1.1\r\n") and f"host: {APP}" in fields_of(head)
        target.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nall\r\n0\r\n\r\n")
        head = visitor.read_head()
        assert not any(line.startswith("transfer-encoding") for line in fields_of(head))
        assert visitor.read_to_end() == b"all"


def test_answer_that_ends_with_the_targets_connection_is_chunked_for_the_visitor(gateway, origin):
    visitor, target, _ = begin(gateway, origin)
    with visitor:
        target.send(b"HTTP/1.1 200 OK\r\n\r\nall")
        target.close()
        head, body = visitor.read_message()
        assert body == b"all" and "transfer-encoding: chunked" in fields_of(head)


def test_trailers_are_passed_on_both_ways(gateway, origin):
    visitor, target, _ = begin(
        gateway, origin, "Transfer-Encoding: chunked", "Trailer: X-Sum", method="POST"
    )
    with visitor:
        visitor.send(b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")
        assert target.read_until(b"\r\n\r\n").endswith(b"0\r\nX-Sum: 1\r\n\r\n")
        target.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n")
        target.send(b"2\r\nok\r\n0\r\nX-End: 2\r\n\r\n")
        assert "trailer: x-end" in fields_of(visitor.read_head())
        assert visitor.read_until(b"\r\n\r\n") == b"2\r\nok\r\n0\r\nX-End: 2\r\n\r\n"


# Connections -------------------------------------------------------------------------------------


def test_one_connection_carries_several_requests_at_both_ends(gateway, origin):
    with gateway.dial(APP) as visitor:
        target = visit_once(visitor, origin, "/0")
        for number in range(1, 20):
            visitor.send(request("GET", f"/{number}"))
            assert target.read_head().startswith(b"GET /%d " % number)
            target.send(answer(b"%d" % number))
            assert visitor.read_message()[1] == b"%d" % number
    assert origin.was_left_alone()


WHOLE = {  # answers that end where they say so
    "sized": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
}
LATE = {  # what targets send behind them
    "body": b"and more\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n",
    "answer": answer(b"whose is it?"),
    "101": b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n",
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_late_bytes_of_an_answer_end_its_connection_and_reach_nobody(gateway, origin, whole, late):
    with gateway.dial(APP) as visitor:
        visitor.send(request())
        target = origin.accept()
        target.read_head()
        target.send(whole)
        assert visitor.read_message()[1] == b"ok"
        [tunnel] = gateway.inner.tunnels.registered()
        wait_until(lambda: len(tunnel._kept._all) == 1)
        target.send(late)
        with contextlib.suppress(*CUT):
            assert target.read_to_end() == b""  # the gateway closes it at once
        wait_until(lambda: not tunnel._kept._all)
    with gateway.dial(APP) as visitor:
        visitor.send(request())
        target = origin.accept()
        target.read_head()
        target.send(answer(b"its own"))
        assert visitor.read_message()[1] == b"its own"


def test_body_that_is_late_for_head_reaches_no_other_visitor(gateway, origin):
    """An http.server handler with ``do_HEAD = do_GET`` sends such a body."""

    def script(target):
        if target.read_head().startswith(b"HEAD"):
            target.send(b"HTTP/1.1 200 OK\r\nContent-Length: 45\r\n\r\n")
            target.read_head()  # the next visitor's, if this connection were kept
            target.send(answer(b"another's"))
        else:
            target.send(answer(b"its own"))

    origin.serve(script)
    with gateway.dial(APP) as visitor:
        visitor.send(request("HEAD"))
        assert status_of(visitor.read_head()) == 200
    with gateway.dial(APP) as visitor:
        visitor.send(request())
        assert visitor.read_message()[1] == b"its own"


def test_kept_connections_wait_in_silence_and_go_on(gateway, origin):
    """Idle visitors are parked with the listener meanwhile."""
    origin.serve(echo_path)
    with gateway.dial(APP) as first, gateway.dial(APP) as second:
        for number in range(5):
            for visitor in (first, second):
                visitor.send(request("GET", f"/{number}"))
                assert visitor.read_message()[1] == b"/%d" % number


def test_pipelined_requests_are_answered_in_order(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(b"".join(request("GET", f"/{number}") for number in range(5)))
        target = origin.accept()
        for number in range(5):
            assert target.read_head().startswith(b"GET /%d " % number)
            target.send(answer(b"%d" % number))
        assert [visitor.read_message()[1] for _ in range(5)] == [b"%d" % n for n in range(5)]


def test_request_behind_a_body_is_a_request_of_its_own(gateway, origin):
    origin.serve(echo_path)
    with gateway.dial(APP) as visitor:
        visitor.send(request("POST", "/1", body=b"GET /x HTTP/1.1\r\n\r\n") + request("GET", "/2"))
        assert [visitor.read_message()[1] for _ in range(2)] == [b"/1", b"/2"]


def echo_path(target):
    while True:
        head, _ = target.read_message()
        target.send(answer(head.split(b" ")[1]))


def test_connection_close_of_the_visitor_is_obeyed(gateway, origin):
    origin.serve(echo_path)
    with gateway.dial(APP) as visitor:
        visitor.send(request("GET", "/", "Connection: close"))
        assert "connection: close" in fields_of(visitor.read_message()[0])
        assert visitor.read_to_end() == b""


# Both directions at once -------------------------------------------------------------------------


def test_early_answer_reaches_a_visitor_that_still_sends(gateway, origin):
    visitor, target, _ = begin(gateway, origin, f"Content-Length: {10 * MIB}", method="POST")
    with visitor:
        visitor.send(bytes(1000))
        target.send(answer(b"too much", "Connection: close", status="413 Content Too Large"))
        target.finish()
        head, body = visitor.read_message()
        assert (status_of(head), body) == (413, b"too much")
        assert "connection: close" in fields_of(head)
        assert visitor.read_to_end() == b""


def test_visitor_that_sends_everything_first_gets_the_early_answer_too(gateway, origin):
    origin.serve(lambda target: [target.read_head(), target.send(
        answer(b"no", "Connection: close", status="403 Forbidden"))])  # fmt: skip
    with gateway.visitor(APP) as visitor:
        visitor.request("POST", "/", bytes(10 * MIB))
        response = visitor.getresponse()
        assert (response.status, response.read()) == (403, b"no")


def test_target_may_answer_while_it_reads(gateway, origin):
    visitor, target, _ = begin(gateway, origin, "Transfer-Encoding: chunked", method="POST")
    with visitor:
        target.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert status_of(visitor.read_head()) == 200
        for number in range(10):
            chunk = b"5\r\npart%d\r\n" % number
            visitor.send(chunk)
            assert target.read_exactly(len(chunk)) == chunk
            target.send(chunk)
            assert visitor.read_exactly(len(chunk)) == chunk
        visitor.send(b"0\r\n\r\n")
        assert target.read_until(b"\r\n\r\n") == b"0\r\n\r\n"
        target.send(b"0\r\n\r\n")
        assert visitor.read_until(b"\r\n\r\n") == b"0\r\n\r\n"


def test_server_sent_events_arrive_one_by_one(gateway, origin):
    visitor, target, _ = begin(gateway, origin, "Accept: text/event-stream")
    with visitor:
        target.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        visitor.read_head()
        for number in range(5):
            event = b"data: %d\n\n" % number
            target.send(event)
            size = int(visitor.read_until(b"\r\n"), 16)
            assert visitor.read_exactly(size + 2) == event + b"\r\n"


def test_upgrade_carries_raw_bytes_both_ways_from_the_first_on(gateway, origin):
    with gateway.dial(APP) as visitor:
        hello = request("GET", "/", "Connection: Upgrade", "Upgrade: chat")
        visitor.send(hello + b"visitor's first\n")
        target = origin.accept()
        head = target.read_head()
        assert {"connection: upgrade", "upgrade: chat"} <= set(fields_of(head))
        target.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n"
            b"target's first\n"
        )
        head = visitor.read_head()
        assert status_of(head) == 101 and "upgrade: chat" in fields_of(head)
        assert visitor.read_until(b"\n") == b"target's first\n"
        assert target.read_until(b"\n") == b"visitor's first\n"
        for word in (b"ping\n", b"\x00\xff\n", bytes(200_000) + b"\n"):
            visitor.send(word)
            assert target.read_until(b"\n") == word
            target.send(word)
            assert visitor.read_until(b"\n") == word
        visitor.finish()
        assert target.read_to_end() == b""
        target.close()
        assert visitor.read_to_end() == b""


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (("Content-Length: 2",), b"{}"),
        (("Content-Length: 0", "X-Stream-Protocol-Version: v4.channel.k8s.io"), b""),
        (("Transfer-Encoding: chunked",), b"2\r\n{}\r\n0\r\n\r\n"),
        ((), b""),
    ],
    ids=["docker", "kubectl", "chunked", "without"],
)
@pytest.mark.parametrize("first", ["visitor", "target"])
def test_half_close_is_passed_on_after_an_upgrade(gateway, origin, fields, body, first):
    """After any request: docker sends a POST with a body, kubectl one with an empty body."""
    hello = request("POST", "/exec", "Connection: Upgrade", "Upgrade: SPDY/3.1", *fields)
    with gateway.dial(APP) as visitor:
        visitor.send(hello + body)
        target = origin.accept()
        head = target.read_head()
        assert {"connection: upgrade", "upgrade: spdy/3.1"} <= set(fields_of(head))
        assert target.read_exactly(len(body)) == body
        target.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
        assert status_of(visitor.read_head()) == 101
        ends = (visitor, target) if first == "visitor" else (target, visitor)
        ends[0].send(b"all that there is")
        ends[0].finish()
        assert ends[1].read_to_end() == b"all that there is"
        answered = random.Random(1).randbytes(3 * MIB)
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(ends[0].read_to_end)
            ends[1].send(answered)
            ends[1].finish()
            assert digest(read.result()) == digest(answered)


def test_body_that_comes_after_the_101_still_goes_before_what_is_behind_it(gateway, origin):
    with gateway.dial(APP) as visitor:
        fields = ("Connection: Upgrade", "Upgrade: tcp", "Content-Length: 4")
        visitor.send(request("POST", "/", *fields))
        target = origin.accept()
        target.read_head()
        target.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        visitor.send(b"body" + b"raw")
        assert target.read_exactly(7) == b"bodyraw"
        assert status_of(visitor.read_head()) == 101
        target.close()


def test_upgrade_ends_when_the_target_does(gateway, origin):
    visitor, target, _ = begin(gateway, origin, "Connection: Upgrade", "Upgrade: chat")
    with visitor:
        target.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\nbye")
        target.close()
        visitor.read_head()
        assert visitor.read_to_end() == b"bye"


def test_upgrade_that_the_target_declines_is_an_ordinary_answer(gateway, origin):
    visitor, target, _ = begin(gateway, origin, "Connection: Upgrade", "Upgrade: chat")
    with visitor:
        target.send(answer(b"no"))
        assert visitor.read_message()[1] == b"no"
        with contextlib.suppress(*CUT):
            assert target.read_to_end() == b""


# What breaks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nnot all",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nnot all",
    ],
)
@pytest.mark.parametrize("end", [Wire.close, Wire.reset])
def test_answer_cut_short_never_looks_complete(gateway, origin, reply, end):
    visitor, target, _ = begin(gateway, origin)
    with visitor:
        target.send(reply)
        visitor.read_head()  # so that the gateway has it before the target is gone
        end(target)
        with pytest.raises(CUT):
            visitor.read_to_end()


def test_answer_until_close_that_is_reset_never_looks_complete(gateway, origin):
    visitor, target, _ = begin(gateway, origin)
    with visitor:
        target.send(b"HTTP/1.1 200 OK\r\n\r\nnot all")
        visitor.read_until(b"not all\r\n")
        target.reset()
        with pytest.raises(CUT):
            visitor.read_to_end()


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nX-Cut", b"no http at all\r\n\r\n"])
def test_broken_head_of_an_answer_is_a_502(gateway, origin, reply):
    visitor, target, _ = begin(gateway, origin, method="POST")
    with visitor:
        target.send(reply)
        target.close()
        head, _ = visitor.read_message()
        assert status_of(head) == 502
        assert any(line.startswith("x-gotunnel-error: ") for line in fields_of(head))


@pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
@pytest.mark.parametrize(
    "already_sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\npart"]
)
def test_target_learns_soon_that_its_visitor_has_gone(gateway, origin, leave, already_sent):
    visitor, target, _ = begin(gateway, origin)
    if already_sent:
        target.send(already_sent)
        visitor.read_until(b"part")
    leave(visitor)
    target.sock.settimeout(SOON)
    with contextlib.suppress(ConnectionResetError):
        assert target.read_to_end() == b""


def test_target_learns_soon_that_an_upload_was_given_up(gateway, origin):
    visitor, target, _ = begin(gateway, origin, "Content-Length: 100", method="POST")
    visitor.send(b"not all")
    assert target.read_exactly(7) == b"not all"
    visitor.close()
    target.sock.settimeout(SOON)
    with contextlib.suppress(ConnectionResetError):
        assert target.read_to_end() == b""


def test_stream_that_went_stale_is_replaced_without_the_visitor_noticing(gateway, origin):
    with gateway.dial(APP) as visitor:
        stale = visit_once(visitor, origin)
        visitor.send(request("GET", "/again"))
        assert stale.read_head().startswith(b"GET /again ")
        stale.close()
        fresh = origin.accept()
        assert fresh.read_head().startswith(b"GET /again ")
        fresh.send(answer(b"answered"))
        assert visitor.read_message()[1] == b"answered"


@pytest.mark.parametrize("body", [b"", b"once"])
def test_post_is_never_sent_twice(gateway, origin, body):
    with gateway.dial(APP) as visitor:
        kept = visit_once(visitor, origin)
        visitor.send(request("POST", "/", body=body))
        target = origin.accept()  # a connection of its own: the kept one might close meanwhile
        target.read_message()
        target.close()
        assert status_of(visitor.read_message()[0]) == 502
        assert origin.was_left_alone()
        kept.sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            assert kept.read() == b""


def test_silent_target_is_a_504_and_is_hung_up_on(cache, tmp_path, origin):
    with served_with(cache, tmp_path, origin, RESPONSE_TIMEOUT="0.2") as gateway:
        visitor, target, _ = begin(gateway, origin)
        with visitor:
            head, _ = visitor.read_message()
            assert status_of(head) == 504 and "x-gotunnel-error: timed-out" in fields_of(head)
            with contextlib.suppress(ConnectionResetError):
                assert target.read_to_end() == b""


def test_response_timeout_does_not_cut_an_answer_that_has_begun(cache, tmp_path, origin):
    with served_with(cache, tmp_path, origin, RESPONSE_TIMEOUT="0.2") as gateway:
        visitor, target, _ = begin(gateway, origin)
        with visitor:
            target.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
            visitor.read_until(b"half")
            visitor.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                visitor.read()
            target.send(b"rest")
            visitor.sock.settimeout(SOON)
            assert visitor.read_exactly(4) == b"rest"


# Answers of the gateway itself -------------------------------------------------------------------


def test_target_that_is_down_is_a_502(cache, tmp_path):
    with reserved_port() as port, gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, http={APP: port}), gateway.visitor(APP) as visitor:
            visitor.request("GET", "/")
            response = visitor.getresponse()
            assert response.status == 502
            assert response.getheader("X-Gotunnel-Error") == "target-unreachable"
            assert b"does not answer" in response.read()


def test_target_cannot_speak_in_the_gateways_name(gateway, origin):
    """X-Gotunnel-Error is removed from heads, interim heads, 101 and trailers of a target."""
    ours = b"X-Gotunnel-Error: no-tunnel\r\nX_Gotunnel.Error: no-tunnel\r\n"
    with gateway.dial(APP) as visitor:
        visitor.send(request())
        target = origin.accept()
        target.read_head()
        target.send(b"HTTP/1.1 103 Early Hints\r\n" + ours + b"\r\n")
        target.send(b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n" + ours)
        target.send(b"\r\n0\r\n" + ours + b"\r\n")
        seen = visitor.read_head() + visitor.read_head() + visitor.read_until(b"0\r\n\r\n")
        assert b"gotunnel" not in seen.lower()
    with gateway.dial(APP) as visitor:
        visitor.send(request("GET", "/", "Connection: Upgrade", "Upgrade: chat"))
        target = origin.accept()
        target.read_head()
        switching = b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: chat\r\n"
        target.send(switching + ours + b"\r\n")
        assert b"gotunnel" not in visitor.read_head().lower()
        target.close()


def test_stream_that_is_reset_before_its_request_is_out_is_a_502(gateway, origin, monkeypatch):
    def reset(tunnel, route, ends, first, relayed):
        raise StreamReset

    with gateway.dial(APP) as visitor:
        monkeypatch.setattr(tunnel_module.Tunnel, "open", reset)
        visitor.send(request("POST", body=b"x"))
        head, _ = visitor.read_message()
        assert head.startswith(b"HTTP/1.1 502 ") and b"X-Gotunnel-Error: agent-gone\r\n" in head


def test_hostname_whose_agent_has_gone_is_a_502(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
        with gateway.visitor(APP) as visitor:
            visitor.request("GET", "/")
            response = visitor.getresponse()
            assert response.status == 502
            assert response.getheader("X-Gotunnel-Error") == "no-tunnel"
            assert APP.encode() in response.read()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("other.localhost", 421),
        (GATEWAY_HOST, 421),
        (RAW, 421),
        ("APP.LocalHost", 200),
        ("app.localhost.", 200),
        ("app.localhost:443", 200),
    ],
)
def test_host_must_be_the_name_that_the_connection_was_opened_for(gateway, origin, host, status):
    origin.serve(echo_path)
    with gateway.dial(APP) as visitor:
        visitor.send(request(host=host))
        assert status_of(visitor.read_message()[0]) == status


def test_gateway_answers_to_its_own_name_with_a_landing_page(gateway):
    status, page = gateway.get(GATEWAY_HOST)
    assert status == 200 and GATEWAY_HOST.encode() in page


def test_visitor_without_sni_sees_the_gateway(gateway):
    context = tls_context(gateway.ca_file)
    context.check_hostname = False
    with dial_tls(gateway.public_port, None, context) as visitor:
        certificate = visitor.sock.getpeercert()
        assert ("DNS", GATEWAY_HOST) in certificate["subjectAltName"]
        visitor.send(request(host=GATEWAY_HOST))
        assert status_of(visitor.read_message()[0]) == 200


def test_hostname_without_a_certificate_is_refused_with_the_alert(gateway):
    with pytest.raises(ssl.SSLError) as caught:
        gateway.dial("unheard-of.localhost")
    assert "UNRECOGNIZED_NAME" in caught.value.reason


def test_visitors_are_offered_http_1_1(gateway):
    context = tls_context(gateway.ca_file)
    context.set_alpn_protocols(["spdy/3", "http/1.1"])
    with dial_tls(gateway.public_port, APP, context) as visitor:
        assert visitor.sock.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_are_served(gateway, origin, version):
    origin.serve(echo_path)
    context = tls_context(gateway.ca_file)
    context.minimum_version = context.maximum_version = version
    with dial_tls(gateway.public_port, APP, context) as visitor:
        visitor.send(request("GET", "/tls"))
        assert visitor.read_message()[1] == b"/tls"


# Fields ------------------------------------------------------------------------------------------


def test_target_is_told_who_visits_whatever_the_visitor_says(gateway, origin):
    lies = [
        "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: http", "x-forwarded-host: bank.example",
        "X-Forwarded-Port: 1", "X-Real-IP: 1.2.3.4", "Forwarded: for=1.2.3.4",
    ]  # fmt: skip
    visitor, target, head = begin(gateway, origin, *lies)
    with visitor:
        told = [line for line in fields_of(head) if line.startswith(("x-", "forwarded"))]
        assert sorted(told) == [
            "x-forwarded-for: 127.0.0.1",
            f"x-forwarded-host: {APP}",
            "x-forwarded-proto: https",
            "x-real-ip: 127.0.0.1",
        ]


def test_fields_of_one_connection_stay_there(gateway, origin):
    visitor, target, head = begin(
        gateway, origin, "Connection: keep-alive, X-Mine", "X-Mine: 1", "Keep-Alive: timeout=9",
        "TE: trailers", "Proxy-Connection: keep-alive", "Proxy-Authorization: x", "X-Other: 2",
    )  # fmt: skip
    with visitor:
        names = {line.partition(":")[0] for line in fields_of(head)}
        assert "x-other" in names
        assert not names & {"connection", "x-mine", "keep-alive", "te", "proxy-connection",
                            "proxy-authorization"}  # fmt: skip
        target.send(answer(b"ok", "Connection: X-Yours", "X-Yours: 1", "Keep-Alive: timeout=9",
                           "Proxy-Authenticate: x", "X-Other: 2"))  # fmt: skip
        names = {line.partition(":")[0] for line in fields_of(visitor.read_message()[0])}
        assert "x-other" in names
        assert not names & {"connection", "x-yours", "keep-alive", "proxy-authenticate"}


# Broken and hostile visitors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: app.localhost\r\nHost: app.localhost\r\n\r\n",
        b"GET / HTTP/1.1\nHost: app.localhost\n\n",
        b"GET / HTTP/1.1\r\nHost : app.localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: app.localhost\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: app.localhost\r\nA: b\rc\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: app.localhost\r\nA: b\0c\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 1\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 1\r\n"
        b"Content-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01 no request\r\n\r\n",
    ],
)
def test_malformed_head_is_a_400_and_never_reaches_the_target(gateway, origin, head):
    with gateway.dial(APP) as visitor:
        visitor.send(head)
        answered, _ = visitor.read_message()
        assert status_of(answered) == 400
        assert "x-gotunnel-error: malformed-request" in fields_of(answered)
        assert visitor.read_to_end() == b""
    assert origin.was_left_alone()


def test_bad_chunk_is_a_400_and_the_target_sees_no_end_of_the_body(gateway, origin):
    visitor, target, _ = begin(gateway, origin, "Transfer-Encoding: chunked", method="POST")
    with visitor:
        visitor.send(b"3\r\nabc\r\n")
        assert target.read_exactly(8) == b"3\r\nabc\r\n"
        visitor.send(b"zz\r\nabc\r\n0\r\n\r\n")
        assert status_of(visitor.read_message()[0]) == 400
        with contextlib.suppress(ConnectionResetError):
            assert target.read_to_end() == b""


def test_head_of_many_fields_is_a_431(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(b"GET / HTTP/1.1\r\n" + b"X-Filler: 0123456789\r\n" * 4000)
        assert status_of(visitor.read_message()[0]) == 431
    assert origin.was_left_alone()


def test_slow_head_is_a_408(cache, tmp_path, origin, quick_sweeps):
    with served_with(cache, tmp_path, origin, HEADER_TIMEOUT="0.3") as gateway:
        with gateway.dial(APP) as visitor:
            visitor.send(b"GET / HTTP/1.1\r\nHost: ")
            assert status_of(visitor.read_message()[0]) == 408
            assert visitor.read_to_end() == b""
        assert origin.was_left_alone()


def test_trickling_head_is_a_408_too(cache, tmp_path, origin, quick_sweeps):
    """Each byte comes in time; the head as a whole does not."""
    with served_with(cache, tmp_path, origin, HEADER_TIMEOUT="0.3") as gateway:
        with gateway.dial(APP) as visitor:
            visitor.sock.settimeout(0.02)
            while True:
                visitor.send(b"G")
                with contextlib.suppress(TimeoutError):
                    assert visitor.read().startswith(b"HTTP/1.1 408 ")
                    break


@pytest.mark.parametrize("behind", [b"\r", b"\r\n"])
def test_empty_line_behind_a_body_is_no_head_that_is_late(
    cache, tmp_path, origin, quick_sweeps, behind
):
    origin.serve(echo_path)
    with served_with(cache, tmp_path, origin, HEADER_TIMEOUT="0.1") as gateway:
        with gateway.dial(APP) as visitor:
            visitor.send(request("POST", "/1", body=b"x") + behind)
            assert visitor.read_message()[1] == b"/1"
            visitor.sock.settimeout(1)
            with pytest.raises(TimeoutError):
                visitor.read()
            visitor.sock.settimeout(SOON)
            visitor.send((b"\n" if behind == b"\r" else b"") + request("GET", "/2"))
            assert visitor.read_message()[1] == b"/2"


def test_idle_connection_is_closed_without_a_word(cache, tmp_path, origin, quick_sweeps):
    with served_with(cache, tmp_path, origin, IDLE_TIMEOUT="0.3") as gateway:
        with gateway.dial(APP) as visitor:
            visit_once(visitor, origin)
            assert visitor.read_to_end() == b""


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x00\x05\x02abcd", b"\x80\x2e\x01\x00\x02"])
def test_what_is_no_tls_is_closed_and_others_never_notice(gateway, origin, garbage):
    origin.serve(echo_path)
    with gateway.dial(APP) as visitor:
        with Wire(socket.create_connection(("127.0.0.1", gateway.public_port))) as stranger:
            stranger.send(garbage)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.read_to_end() == b""
        visitor.send(request("GET", "/fine"))
        assert visitor.read_message()[1] == b"/fine"


def test_silence_instead_of_a_hello_is_closed_in_time(cache, tmp_path, origin, quick_sweeps):
    with served_with(cache, tmp_path, origin, HEADER_TIMEOUT="0.3") as gateway:
        with Wire(socket.create_connection(("127.0.0.1", gateway.public_port))) as stranger:
            assert stranger.read_to_end() == b""


def test_hello_may_come_byte_by_byte(gateway, origin):
    """The SNI is read before the handshake, from whatever pieces."""
    origin.serve(echo_path)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = tls_context(gateway.ca_file).wrap_bio(incoming, outgoing, server_hostname=APP)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    with Wire(socket.create_connection(("127.0.0.1", gateway.public_port))) as wire:
        for byte in outgoing.read():
            wire.send(bytes([byte]))
        while True:
            incoming.write(wire.read())
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
        tls.write(request("GET", "/slowly"))
        wire.send(outgoing.read())
        seen = b""
        while not seen.endswith(b"/slowly"):
            incoming.write(wire.read())
            with contextlib.suppress(ssl.SSLWantReadError):
                seen += tls.read()
        assert status_of(seen) == 200


def test_visitors_beyond_the_limit_are_turned_away_until_one_leaves(cache, tmp_path, origin):
    origin.serve(echo_path)
    changes = {"MAX_CONNECTIONS": "2", "TRUSTED_PROXIES": "127.0.0.1"}
    with served_with(cache, tmp_path, origin, **changes) as gateway:
        with gateway.dial(APP), gateway.dial(APP) as second:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                gateway.dial(APP)
            second.send(request("GET", "/inside"))
            assert second.read_message()[1] == b"/inside"
        wait_until(lambda: _is_served(gateway))


def _is_served(gateway):
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        return gateway.get(APP)[0] == 200


def test_silent_visitors_hold_no_worker(cache, tmp_path, origin):
    """More silent visitors than workers, in each state in which a visitor can be silent."""
    origin.serve(echo_path)
    with served_with(cache, tmp_path, origin, WORKERS="2") as gateway, contextlib.ExitStack() as up:
        for _ in range(5):
            silent = socket.create_connection(("127.0.0.1", gateway.public_port))
            up.enter_context(Wire(silent))
            half = up.enter_context(Wire(socket.create_connection(silent.getpeername())))
            half.send(b"\x16\x03\x01\x02\x00\x01")
            up.enter_context(gateway.dial(APP))
            cut = up.enter_context(gateway.dial(APP))
            cut.send(b"GET / HTT")
            idle = up.enter_context(gateway.dial(APP))
            idle.send(request("GET", "/first"))
            assert idle.read_message()[1] == b"/first"
        assert gateway.get(APP, "/served") == (200, b"/served")


# Many at once ------------------------------------------------------------------------------------

VISITORS = 50
VISITS = 20  # of each


def echo_body(target):
    while True:
        head, body = target.read_message()
        target.send(answer(head.split(b" ")[1] + b" " + body))


def test_many_visitors_at_once_each_get_their_own_answers(gateway, origin):
    """The target keeps its connections. test_http_rules.py has one that closes now and then."""
    origin.serve(echo_body)

    def visit(visitor_number):
        with gateway.visitor(APP) as visitor:
            for number in range(VISITS):
                path = f"/{visitor_number}/{number}"
                body = random.Random(path).randbytes(number * 500)
                visitor.request("PUT" if number % 2 else "GET", path, body if number % 2 else None)
                expected = path.encode() + b" " + (body if number % 2 else b"")
                response = visitor.getresponse()
                assert (response.status, response.read()) == (200, expected)
        return visitor_number

    with ThreadPoolExecutor(VISITORS) as pool:
        assert list(pool.map(visit, range(VISITORS))) == list(range(VISITORS))


def test_restarted_gateway_has_a_page_for_a_hostname_until_its_agent_is_back(tmp_path, origin):
    origin.serve(echo_path)
    cache = tmp_path / "cache"
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, http={APP: origin.port}):
        assert gateway.get(APP)[0] == 200
    with gateway_here(cache) as gateway:
        assert gateway.get(APP)[0] == 502


def test_visitor_who_goes_on_sending_after_a_400_is_cut_off(gateway, monkeypatch):
    monkeypatch.setattr(connection, "PARTING_TIME", 0.1)
    monkeypatch.setattr(listener, "SWEEP", 0.05)
    with gateway.dial(APP) as endless:
        endless.send(b"GET  / HTTP/1.1\r\n\r\n")
        with pytest.raises((ConnectionError, ssl.SSLError)):
            while True:
                endless.send(bytes(MIB))
