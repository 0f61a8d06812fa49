"""An exchange without sockets: its visitor and its stream are plain objects."""

import inspect
import threading
import time

import pytest
from fake_exchange import APP, OK, SILENCE, SOON, Stream, Tunnel, Visitor
from support import wait_until

from gotunnel import NoThread, SessionClosed, StreamReset
from gotunnel_agent.common.http1 import Malformed
from gotunnel_agent.common.refusals import BY_CODE, GONE, OF_GATEWAYS
from gotunnel_server.routes import AgentBusy, Route
from gotunnel_server.visitors import upload
from gotunnel_server.visitors.exchange import Exchange
from gotunnel_server.visitors.forwarded import Proxies
from gotunnel_server.visitors.http1_server import Http1Request
from gotunnel_server.visitors.request import AgentLost, Request, VisitorGone
from gotunnel_server.visitors.sites import Forward


def run(visitor, tunnel, response_timeout=SOON, **more):
    route = Route(APP, "http", tunnel, host_header=more.pop("host_header", None))
    Exchange(visitor, Forward(route, **more), Proxies(), response_timeout).run()


def served(visitor, *script):
    """The stream over which a visitor was answered."""
    stream = Stream(*script, visitor=visitor)
    run(visitor, Tunnel(stream))
    return stream


def test_http1_implements_the_whole_interface():
    """Attributes, and methods with as many parameters."""
    blank = Http1Request.__new__(Http1Request)
    # By its __init__(), of its handler.
    made_later = {"scheme", "sni", "owner", "peer", "idle_timeout", "visit", "may_wait",
                  "templates"}  # fmt: skip
    for name in Request.__annotations__.keys() - made_later - {"body_complete"}:
        assert hasattr(blank, name), name
    assert isinstance(Http1Request.body_complete, property)
    methods = inspect.getmembers(Request, inspect.isfunction)
    for name, method in [pair for pair in methods if not pair[0].startswith("_")]:
        for implementation in (Http1Request, Visitor):
            ours = inspect.signature(getattr(implementation, name)).parameters
            assert list(ours) == list(inspect.signature(method).parameters), name


# Asking ------------------------------------------------------------------------------------------


def test_target_gets_the_request_without_what_was_for_the_visitors_connection():
    visitor = Visitor("GET", "/a?b", ("Connection", "x-b"), ("X-A", "1"), ("X-B", "2"))
    stream = served(visitor, OK)
    assert stream.sent == (
        b"GET /a?b HTTP/1.1\r\nHost: app.example.com:8443\r\nX-A: 1\r\n"
        b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n"
        b"X-Forwarded-Host: app.example.com:8443\r\nX-Real-IP: 192.0.2.1\r\n\r\n"
    )


def test_site_adds_and_strips_fields_in_any_spelling():
    visitor = Visitor("GET", "/", ("X-User", "root"), ("x_user", "root"), ("Authorization", "x"))
    stream = Stream(OK, visitor=visitor)
    run(visitor, Tunnel(stream), add=(("X-User", "me"),), strip=("authorization", "x-user"))
    head = stream.sent.lower()
    assert head.count(b"x-user: me\r\n") == 1 and b"root" not in head
    assert b"authorization" not in head


def test_route_may_have_a_host_of_its_own():
    visitor = Visitor()
    stream = Stream(OK, visitor=visitor)
    run(visitor, Tunnel(stream), host_header="localhost")
    assert stream.sent.startswith(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: ")
    assert b"X-Forwarded-Host: app.example.com:8443\r\n" in stream.sent


def test_kept_stream_is_used_and_kept_again():
    visitor = Visitor()
    kept = Stream(OK, visitor=visitor)
    tunnel = Tunnel(kept=[kept])
    run(visitor, tunnel)
    assert visitor.status == 200 and tunnel.opened == [] and "keep" in visitor.events


@pytest.mark.parametrize("end", [b"", StreamReset()])
def test_kept_stream_that_is_stale_is_replaced_once(end):
    visitor = Visitor()
    stale, fresh = Stream(end), Stream(OK, visitor=visitor)
    run(visitor, Tunnel(fresh, kept=[stale]))
    assert fresh.sent == stale.sent and stale.events == ["close"]
    assert visitor.status == 200
    visitor, ends = Visitor(), Stream(b"")
    run(visitor, Tunnel(ends, kept=[Stream(end)]))
    assert (visitor.status, visitor.code) == (502, "no-answer") and ends.events == ["reset"]


@pytest.mark.parametrize(("method", "body"), [("POST", None), ("GET", 2), ("PUT", 0)])
def test_request_that_must_not_come_twice_takes_no_kept_stream(method, body):
    visitor = Visitor(method, body=body)
    visitor.body.put([b"hi"])
    tunnel = Tunnel(Stream(OK), kept=[Stream(OK)])
    run(visitor, tunnel)
    assert visitor.status == 200 and len(tunnel.opened) == len(tunnel.kept) == 1


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (SessionClosed("closed"), (502, "agent-gone")),
        (StreamReset(), (502, "agent-gone")),
        (TimeoutError(), (503, "agent-busy")),
        (AgentBusy("its agent may have 1 visits at once, and has 1"), (503, "agent-limit")),
    ],
)
def test_agent_that_gives_no_stream_is_a_page(problem, expected):
    visitor = Visitor()
    run(visitor, Tunnel(problem))
    assert (visitor.status, visitor.code) == expected
    assert visitor.events[-1][0] == "finish" and visitor.events[-1][1].startswith(b"<!doctype")


def test_page_of_a_head_request_has_its_length_and_no_body():
    visitor = Visitor("HEAD")
    run(visitor, Tunnel(TimeoutError()))
    head, finish = visitor.events
    assert head[3] > 100 and finish == ("finish",)


# Answers -----------------------------------------------------------------------------------------


def test_small_answer_leaves_in_one_and_its_stream_is_kept_before():
    visitor = Visitor()
    served(visitor, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nA: b\r\nKeep-Alive: 5\r\n\r\nokay")
    assert visitor.events == [("head", 200, [("A", "b")], 4), "keep", ("finish", b"okay")]


def test_answer_is_passed_on_as_it_comes_also_its_head():
    visitor = Visitor()
    served(visitor, b"HTTP/1.1 200 OK\r\nContent-", b"Length: 4\r\n\r\n", b"ok", SILENCE, b"ay")
    assert visitor.events == [
        ("head", 200, [], 4), ("data",), ("data", b"ok"), "keep", ("finish", b"ay"),
    ]  # fmt: skip


def test_chunked_answer_is_of_no_length_and_keeps_its_trailers():
    visitor = Visitor()
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    served(visitor, head + b"2\r\nok\r\n2\r\nay\r\n", b"1\r\n!\r\n0\r\nA: b\r\n\r\n")
    assert visitor.events == [
        ("head", 200, [], None), ("data", b"ok", b"ay"), "keep", ("finish", b"!"),
    ]  # fmt: skip
    assert visitor.trailers_of_the_answer == [("A", "b")]


def test_answer_until_close_is_of_no_length_and_its_stream_is_not_kept():
    visitor = Visitor()
    served(visitor, b"HTTP/1.1 200 OK\r\n\r\n", b"ok", b"")
    assert visitor.events == [
        ("head", 200, [], None), ("data",), ("data", b"ok"), "close", ("finish",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "status", "length"), [("HEAD", 200, 9), ("GET", 304, 9), ("GET", 204, None)]
)
def test_answer_without_a_body_has_the_length_that_the_target_gave(method, status, length):
    visitor = Visitor(method)
    line = b"" if length is None else b"Content-Length: 9\r\n"
    served(visitor, b"HTTP/1.1 %d X\r\n%b\r\n" % (status, line))
    # Not kept: some targets send a body all the same, and the next visitor would get it.
    assert visitor.events == [("head", status, [], length), "close", ("finish",)]


@pytest.mark.parametrize("body", [b"Content-Length: 0\r\n\r\n", b"Content-Length: 2\r\n\r\nok"])
def test_stream_is_not_kept_after_a_205(body):
    """A 205 has no body, but implementations differ if bytes come (RFC 9110 §15.3.6)."""
    visitor = Visitor()
    served(visitor, b"HTTP/1.1 205 Reset Content\r\n" + body)
    assert "close" in visitor.events and "keep" not in visitor.events


def test_bytes_behind_an_answer_spoil_its_stream():
    visitor = Visitor()
    served(visitor, OK + b"x")
    assert visitor.events[1:] == ["close", ("finish", b"ok")]


def test_interim_answers_come_first():
    visitor = Visitor()
    served(visitor, b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 100\r\n\r\n", OK)
    assert visitor.events[:2] == [("interim", 103, [("Link", "a")]), ("interim", 100, [])]
    assert visitor.status == 200


def test_interim_answers_without_end_are_a_page():
    visitor = Visitor()
    served(visitor, *[b"HTTP/1.1 103 X\r\nLink: " + b"a" * 9000 + b"\r\n\r\n"] * 9)
    assert (visitor.status, visitor.code) == (502, "bad-answer")
    assert [event[0] for event in visitor.events].count("interim") == 7


def test_upgrade_required_says_to_what():
    visitor = Visitor()
    served(visitor, b"HTTP/1.1 426 X\r\nUpgrade: chat\r\nConnection: upgrade\r\n\r\n", b"")
    assert visitor.events[0] == ("head", 426, [("Upgrade", "chat")], None)


# Upgrades ----------------------------------------------------------------------------------------

SWITCHING = (
    b"HTTP/1.1 101 Go\r\nUpgrade: chat\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n"
)


def test_101_turns_the_visitor_over_to_the_stream_with_what_came_behind_it():
    visitor = Visitor("GET", "/", ("Upgrade", "chat"), wants_upgrade=True)
    stream = served(visitor, SWITCHING + b"hello")
    assert b"\r\nUpgrade: chat\r\n" in stream.sent
    assert stream.sent.endswith(b"\r\nConnection: Upgrade\r\n\r\n")
    fields = [("Upgrade", "chat"), ("Sec-WebSocket-Accept", "x")]
    assert visitor.events == [("switch", 101, fields, b"hello", (stream, True, None))]


@pytest.mark.parametrize("knows", [True, False])
def test_agent_is_told_that_a_stream_may_be_upgraded_if_it_knows_what_that_is(knows):
    """For an agent that does not know it, a kept stream will do."""
    visitor = Visitor("GET", "/", ("Upgrade", "chat"), wants_upgrade=True)
    streams = [Stream(SWITCHING, visitor=visitor) for _ in range(2)]
    tunnel = Tunnel(streams[0], kept=[streams[1]])
    tunnel.upgrades = knows
    run(visitor, tunnel)
    assert visitor.events[-1][-1] == (streams[not knows], knows, None)
    assert not knows or tunnel.relayed


class Owner:
    """A login.Owner, with or without a stream."""

    def __init__(self, stream=None):
        self.stream = stream
        self.kept = []

    def take(self, route):
        stream, self.stream = self.stream, None
        return stream

    def keep(self, route, stream):
        self.kept.append(stream)


def test_stream_that_replaces_a_dead_one_of_a_login_is_upgraded_as_its_agent_was_told():
    visitor = Visitor("GET", "/", ("Upgrade", "tcp"), wants_upgrade=True)
    visitor.owner = Owner(Stream(b"", visitor=visitor))
    tunnel = Tunnel(stream := Stream(SWITCHING, visitor=visitor))
    run(visitor, tunnel)
    assert tunnel.relayed
    assert visitor.events[-1][-1] == (stream, True, None)


def test_relayed_stream_of_a_login_is_not_kept():
    """Closing it later sends a FIN, which would not end the target's connection."""
    visitor = Visitor("GET", "/", ("Upgrade", "tcp"), wants_upgrade=True)
    visitor.owner = Owner()
    challenge = b"HTTP/1.1 401 No\r\nWWW-Authenticate: NTLM\r\nContent-Length: 0\r\n\r\n"
    tunnel = Tunnel(Stream(challenge, visitor=visitor))
    run(visitor, tunnel)
    assert tunnel.relayed and visitor.status == 401
    assert not visitor.owner.kept and "reset" in visitor.events


def test_login_that_goes_on_has_its_stream_kept_although_an_upgrade_is_wanted():
    fields = [("Upgrade", "chat"), ("Authorization", "NTLM TlRM")]
    visitor = Visitor("GET", "/", *fields, wants_upgrade=True)
    visitor.owner = Owner()
    challenge = b"HTTP/1.1 401 No\r\nWWW-Authenticate: NTLM TlRM\r\nContent-Length: 0\r\n\r\n"
    tunnel = Tunnel(stream := Stream(challenge, visitor=visitor))
    run(visitor, tunnel)
    assert visitor.owner.kept == [stream] and not tunnel.relayed
    visitor = Visitor("GET", "/", *fields, wants_upgrade=True)
    visitor.owner = Owner(Stream(SWITCHING, visitor=visitor))
    run(visitor, Tunnel())
    assert visitor.events[-1][-1].half_close is False


def test_101_waits_for_the_rest_of_the_body():
    visitor = Visitor("POST", "/", ("Upgrade", "tcp"), wants_upgrade=True, body=...)
    stream = Stream(visitor=visitor)
    ended = post(visitor, stream)
    wait_until(threads)
    stream.came.put(SWITCHING + b"hello")
    visitor.body.put([b"{}"])
    wait_until(lambda: stream.sent.endswith(b"2\r\n{}\r\n"))
    assert visitor.events == []
    visitor.body.put(None)
    assert ended() == [] and visitor.events[0][:2] == ("switch", 101)
    assert stream.sent.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("problem", [Malformed(400, "no size"), VisitorGone()])
def test_101_is_not_passed_on_if_the_body_never_comes_whole(problem):
    visitor = Visitor("POST", "/", ("Upgrade", "tcp"), wants_upgrade=True, body=...)
    stream = Stream(SWITCHING, visitor=visitor)
    ended = post(visitor, stream)
    wait_until(threads)
    visitor.body.put(problem)
    assert [type(error) for error in ended()] == [VisitorGone] * isinstance(problem, VisitorGone)
    assert "reset" in visitor.events and "switch" not in [event[0] for event in visitor.events]


@pytest.mark.parametrize(
    ("asked", "expected"), [(False, (502, "bad-answer")), (True, (503, "gateway-busy"))]
)
def test_101_unasked_or_without_room_is_a_page(asked, expected):
    visitor = Visitor(wants_upgrade=asked, room=False)
    served(visitor, SWITCHING)
    assert (visitor.status, visitor.code) == expected and visitor.events[0] == "reset"


# Answers that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([b""], (502, "no-answer")),
        ([b"HTTP/1.1 200 OK\r\n", b""], (502, "no-answer")),
        ([StreamReset()], (502, "cut-short")),
        ([StreamReset(code=1)], (502, "cut-short")),
        ([StreamReset(code=2)], (502, "target-unreachable")),
        ([StreamReset(code=3)], (502, "target-timed-out")),
        ([StreamReset(code=4)], (502, "target-untrusted")),
        ([StreamReset(code=5)], (502, "target-misconfigured")),
        ([StreamReset(code=6)], (502, "cut-short")),
        ([SessionClosed("closed")], (502, "agent-gone")),
        ([b"hello\r\n\r\n"], (502, "bad-answer")),
    ],
)
def test_target_that_gives_no_answer_is_a_page_and_is_hung_up_on(script, expected):
    visitor = Visitor()
    served(visitor, *script)
    assert (visitor.status, visitor.code) == expected
    assert visitor.events[0] == "reset" and visitor.events[-1][0] == "finish"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (2, (502, "target-unreachable")),
        (6, (502, "agent-gone")),
        (7, (502, "agent-gone")),
        (8, (503, "agent-limit")),
        (9, (503, "agent-busy")),
    ],
)
def test_what_another_gateway_says_of_its_agent_is_a_page(code, expected):
    visitor = Visitor()
    tunnel = Tunnel(Stream(StreamReset(code=code), visitor=visitor))
    tunnel.refusals = BY_CODE | OF_GATEWAYS
    run(visitor, tunnel)
    assert (visitor.status, visitor.code) == expected


@pytest.mark.parametrize("body", [b"", b"body"])
def test_a_request_that_another_gateway_did_not_pass_on_waits_for_the_next_agent(body):
    visitor = Visitor("POST", body=len(body) if body else None)
    visitor.may_wait = True
    visitor.body.put([body])
    tunnel = Tunnel(Stream(StreamReset(code=GONE.code), visitor=visitor))
    tunnel.refusals = BY_CODE | OF_GATEWAYS
    with pytest.raises(AgentLost) as lost:
        run(visitor, tunnel)
    assert lost.value.tunnel is tunnel
    assert ("unread", [body]) in visitor.events or not body


@pytest.mark.parametrize(("looks", "given_up"), [(0, 0), (1, 1), (2, 2), (3, 2), (9, 4)])
def test_kept_streams_are_given_up_for_a_new_one_that_waits(looks, given_up):
    visitor = Visitor()
    stream = Stream(*[SILENCE] * looks, OK, visitor=visitor)
    tunnel = Tunnel(stream)
    run(visitor, tunnel)
    assert getattr(tunnel, "given_up", 0) == given_up and tunnel.served_streams == [stream]


def test_no_kept_stream_is_given_up_for_one_that_was_kept_itself():
    visitor = Visitor()
    tunnel = Tunnel(kept=[Stream(SILENCE, SILENCE, OK, visitor=visitor)])
    run(visitor, tunnel)
    assert not hasattr(tunnel, "given_up") and visitor.status == 200


def test_visit_that_comes_to_nothing_holds_up_no_other():
    visitor = Visitor()
    visitor.left = True
    tunnel = Tunnel(stream := Stream(SILENCE, visitor=visitor))
    with pytest.raises(VisitorGone):
        run(visitor, tunnel)
    assert tunnel.served_streams == [stream]


def test_target_that_is_silent_for_too_long_is_a_504():
    visitor = Visitor()
    stream = Stream(SILENCE, visitor=visitor)
    run(visitor, Tunnel(stream), response_timeout=0)
    assert (visitor.status, visitor.code) == (504, "timed-out") and visitor.events[0] == "reset"


@pytest.mark.parametrize("end", [b"", StreamReset(), SessionClosed("closed")])
@pytest.mark.parametrize("framing", [b"Content-Length: 9", b"Transfer-Encoding: chunked"])
def test_answer_that_is_cut_is_aborted_and_never_finished(framing, end):
    visitor = Visitor()
    with pytest.raises(ConnectionAbortedError):
        served(visitor, b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n2\r\nok", end)
    assert visitor.events[0][0] == "head" and visitor.events[-2:] == ["reset", "abort"]


def test_visitor_that_stops_reading_sees_no_whole_answer():
    """It is reset. In HTTP/1.0 a closed connection would look like the answer's end."""
    for answer in (OK, b"HTTP/1.1 200 OK\r\n\r\nok"):
        visitor = Visitor()
        visitor.stuck = True
        with pytest.raises(TimeoutError):
            served(visitor, answer)
        assert visitor.events[-1] == "abort"


def test_defect_in_the_middle_of_an_answer_leaves_none_that_looks_whole():
    visitor = Visitor()
    with pytest.raises(ZeroDivisionError):
        served(visitor, b"HTTP/1.1 200 OK\r\n\r\nok", ZeroDivisionError())
    assert visitor.events[-2:] == ["reset", "abort"]


@pytest.mark.parametrize("script", [[], [b"HTTP/1.1 200 OK\r\n\r\n"]])
def test_target_of_a_visitor_that_has_gone_is_hung_up_on(script):
    visitor = Visitor()
    visitor.left = True
    with pytest.raises(VisitorGone):
        served(visitor, *script, SILENCE)
    assert "reset" in visitor.events and ("finish",) not in visitor.events


# Requests with a body ----------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name == f"upload {APP}"]


def post(visitor, stream, **more):
    """Run the exchange in a thread; returns a function that waits for its end."""
    problems = []

    def exchange_here():
        try:
            run(visitor, Tunnel(stream), **more)
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=exchange_here)
    thread.start()

    def ended():
        thread.join(SOON)
        assert not thread.is_alive() and threads() == []
        return problems

    return ended


def test_body_at_hand_goes_with_the_head_and_takes_no_thread(monkeypatch):
    monkeypatch.setattr(upload, "spawn", None)
    visitor = Visitor("POST", body=2)
    visitor.body.put([b"h", b"i"])
    stream = Stream(OK, visitor=visitor)
    tunnel = Tunnel(stream)
    run(visitor, tunnel)
    assert tunnel.opened[0].endswith(b"Content-Length: 2\r\n\r\nhi")
    assert visitor.events[1:] == ["close", ("finish", b"ok")]  # not kept after a body


def test_request_without_a_thread_is_refused_and_the_operator_hears_what_helps(monkeypatch, caplog):
    def refuse(*_):
        raise NoThread("no thread to be had: raise the limit (ulimit -u)")

    monkeypatch.setattr(upload, "spawn", refuse)
    visitor = Visitor("POST", body=5)
    served(visitor)
    assert (visitor.status, visitor.code) == (503, "gateway-busy")
    assert b"ulimit" not in b"".join(visitor.events[-1][1:])
    assert "(ulimit -u); a request is refused" in caplog.text


def test_body_of_no_bytes_is_one(monkeypatch):
    monkeypatch.setattr(upload, "spawn", None)
    assert served(Visitor("POST", body=0), OK).sent.endswith(b"Content-Length: 0\r\n\r\n")


def test_body_is_passed_on_as_it_comes_chunk_by_chunk():
    visitor, stream = Visitor("POST", body=...), Stream()
    ended = post(visitor, stream)
    wait_until(lambda: stream.sent.endswith(b"Transfer-Encoding: chunked\r\n\r\n"))
    assert len(threads()) == 1
    visitor.body.put([b"a", b"bc"])
    wait_until(lambda: stream.sent.endswith(b"\r\n\r\n1\r\na\r\n2\r\nbc\r\n"))
    visitor.trailers = [("X-Sum", "1")]
    visitor.body.put(None)
    wait_until(lambda: stream.sent.endswith(b"bc\r\n0\r\nX-Sum: 1\r\n\r\n"))
    stream.came.put(OK)
    assert ended() == [] and visitor.status == 200


def test_early_answer_reaches_a_visitor_that_still_sends():
    visitor, stream = Visitor("POST", body=...), Stream(OK)
    ended = post(visitor, stream)
    wait_until(lambda: "refuse body" in visitor.events)
    assert visitor.events[:2] == [("head", 200, [], 2), ("finish", b"ok")]
    assert stream.events == ["reset"]
    visitor.body.put([b"more"])
    visitor.body.put(None)  # the visitor has seen the answer and stops
    assert ended() == [] and "abort" not in visitor.events


def test_visitor_that_sends_without_end_after_its_answer_is_left_to_its_connection():
    """connection.py reads on, without a thread, so that the visitor can read the answer."""
    visitor = Visitor("POST", body=...)
    assert post(visitor, Stream(OK))() == []
    assert visitor.events[-1] == "refuse body" and not visitor.body_complete


def test_answer_has_its_time_from_the_whole_request_on():
    visitor, stream = Visitor("POST", body=...), Stream(*[SILENCE] * 3)
    ended = post(visitor, stream, response_timeout=0.05)
    for _ in range(10):
        visitor.body.put([b"more"])
        stream.came.put(SILENCE)
        wait_until(lambda: stream.came.empty())
    visitor.body.put(None)
    wait_until(lambda: not threads())
    stream.came.put(OK)
    assert ended() == [] and visitor.status == 200


def test_target_that_is_silent_after_the_whole_request_is_a_504():
    visitor, stream = Visitor("POST", body=...), Stream(SILENCE)
    ended = post(visitor, stream, response_timeout=0)
    wait_until(lambda: stream.came.empty())
    visitor.body.put(None)
    wait_until(lambda: visitor.body_complete and not threads())
    stream.came.put(SILENCE)
    assert ended() == [] and (visitor.status, visitor.code) == (504, "timed-out")


def test_target_that_takes_nothing_of_a_body_is_a_504():
    visitor, stream = Visitor("POST", body=...), Stream()
    ended = post(visitor, stream)
    wait_until(threads)
    stream.deaf = TimeoutError
    visitor.body.put([b"a"])
    wait_until(lambda: visitor.body.empty())
    stream.came.put(SILENCE)
    assert ended() == [] and (visitor.status, visitor.code) == (504, "timed-out")


def test_visitor_that_holds_its_body_back_has_its_time_when_it_is_asked_for():
    visitor = Visitor("POST", "/", ("Expect", "100-Continue"), body=...)
    visitor.idle_timeout = 0.05
    stream = Stream(SILENCE)
    ended = post(visitor, stream)
    time.sleep(0.2)  # four times idle_timeout, which does not count yet
    stream.came.put(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert ended() == [] and (visitor.status, visitor.code) == (408, "body-timeout")
    assert visitor.events[0][:2] == ("interim", 100)


def test_target_that_asks_for_no_body_and_answers_nothing_is_a_504():
    visitor = Visitor("POST", "/", ("Expect", "100-continue"), body=...)
    ended = post(visitor, Stream(SILENCE), response_timeout=0)
    assert ended() == [] and (visitor.status, visitor.code) == (504, "timed-out")


@pytest.mark.parametrize("crowded", [True, False])
def test_body_that_trickles_is_a_408_while_others_need_its_place(crowded, caplog):
    caplog.set_level("INFO")
    visitor, stream = Visitor("POST", body=...), Stream()
    visitor.idle_timeout, visitor.crowded = 0.2, lambda: crowded
    ended = post(visitor, stream)
    for _ in range(40):
        visitor.body.put([b"x"])
        time.sleep(0.01)
    if not crowded:
        visitor.body.put(None)
        stream.came.put(OK)
    assert ended() == []
    if crowded:
        assert (visitor.status, visitor.code) == (408, "body-timeout")
        assert caplog.text.count("less than 240 bytes a second for 0.2 s") == 1
    else:
        assert visitor.status == 200 and not caplog.text


def test_visitor_may_be_silent_while_its_answer_streams():
    visitor = Visitor("POST", body=...)
    visitor.idle_timeout = 0.2
    stream = Stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    ended = post(visitor, stream)
    for _ in range(40):
        stream.came.put(b"2\r\nok\r\n")
        time.sleep(0.01)
    visitor.body.put(None)
    wait_until(lambda: stream.sent.endswith(b"\r\n0\r\n\r\n"))
    stream.came.put(b"0\r\n\r\n")
    assert ended() == [] and "abort" not in visitor.events


def test_visitor_that_is_silent_while_nothing_streams_has_its_answer_reset(caplog):
    caplog.set_level("INFO")
    visitor = Visitor("POST", body=...)
    visitor.idle_timeout = 0.05
    ended = post(visitor, Stream(b"HTTP/1.1 200 OK\r\n\r\n", b"ok"))
    assert [type(error) for error in ended()] == [ConnectionAbortedError]
    assert "abort" in visitor.events and ("finish",) not in visitor.events
    assert caplog.text.count("nothing for 0.05 s") == 1


def test_upload_that_never_ends_is_not_waited_for_without_bound(monkeypatch):
    for name in ("WATCH", "END_TIMEOUT"):
        monkeypatch.setattr(upload, name, 0.01)
    may_end = threading.Event()

    class Hanging(Visitor):
        def read_body(self, timeout):
            if timeout:
                may_end.wait(SOON)
            raise TimeoutError

    visitor = Hanging("POST", body=...)
    with pytest.raises(TimeoutError, match="does not end"):
        served(visitor, OK)
    assert visitor.status == 200
    may_end.set()
    wait_until(lambda: not threads())


def test_target_that_reads_no_body_answers_all_the_same():
    visitor, stream = Visitor("POST", body=...), Stream()
    ended = post(visitor, stream)
    wait_until(threads)
    stream.deaf = StreamReset
    for pieces in ([b"a"], [b"b"], None):
        visitor.body.put(pieces)
    wait_until(lambda: visitor.body_complete)
    stream.came.put(OK)
    assert ended() == [] and visitor.status == 200
    assert stream.events == ["reset"]  # the target has got half a body


@pytest.mark.parametrize("early", [True, False], ids=["at hand", "later"])
def test_body_that_is_malformed_is_a_400_and_never_ends_for_the_target(early):
    visitor, stream = Visitor("POST", body=...), Stream()
    if early:
        visitor.body.put(Malformed(400, "no size"))
    ended = post(visitor, stream)
    if not early:
        wait_until(threads)
        visitor.body.put(Malformed(400, "no size"))
    assert ended() == []
    assert (visitor.status, visitor.code) == (400, "malformed-request")
    assert not stream.sent.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("problem", [VisitorGone(), ConnectionResetError()])
def test_visitor_that_breaks_off_its_body_has_its_target_hung_up_on(problem):
    visitor, stream = Visitor("POST", body=...), Stream()
    ended = post(visitor, stream)
    wait_until(threads)
    visitor.body.put(problem)
    assert [type(error) for error in ended()] == [VisitorGone]
    assert "reset" in stream.events and visitor.events == []


def test_visitor_that_sends_nothing_more_of_its_body_is_a_408():
    visitor, stream = Visitor("POST", body=...), Stream()
    visitor.idle_timeout = 0.05
    assert post(visitor, stream)() == []
    assert (visitor.status, visitor.code) == (408, "body-timeout")
    assert "reset" in stream.events and not stream.sent.endswith(b"0\r\n\r\n")


def test_defect_in_an_upload_is_logged_and_ends_the_request(caplog):
    visitor, stream = Visitor("POST", body=...), Stream()
    ended = post(visitor, stream)
    wait_until(threads)
    visitor.body.put(ZeroDivisionError())
    assert [type(error) for error in ended()] == [VisitorGone]
    assert f"upload {APP}" in caplog.text and "ZeroDivisionError" in caplog.text
