"""A target that speaks HTTP/2, by bytes: what it is sent, and what its answers become.

The first request on a connection is always stream 1, so that answers can be written beforehand.
"""

import queue
import struct
import threading
import time

import pytest
from fake_exchange import APP, SOON, Tunnel, Visitor
from support import wait_until

from gotunnel import START_WINDOW, StreamReset
from gotunnel_server.routes import H2, H2C, Route
from gotunnel_server.visitors.exchange import Exchange
from gotunnel_server.visitors.forwarded import Proxies
from gotunnel_server.visitors.sites import Forward

pytest.importorskip("h2", reason="the Python package h2 is missing")

from hpack import Decoder, Encoder  # noqa: E402

from gotunnel_server.visitors import http2_target  # noqa: E402

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END, ACK, END_HEADERS = 1, 1, 4
REFUSED, CANCEL, INTERNAL = 7, 8, 2


def frame(kind, flags=0, stream=1, payload=b""):
    return struct.pack("!HBBBL", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + (
        payload
    )


def settings(**values):
    codes = {"most_streams": 3, "window": 4, "frame_size": 5}
    payload = b"".join(struct.pack("!HL", codes[name], n) for name, n in values.items())
    return frame(SETTINGS, 0, 0, payload)


def block(*fields):
    """A header block that needs no table: so it can stand at any place."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return encoder.encode([(name.encode(), value.encode("latin-1")) for name, value in fields])


def head(*fields, status="200", ends=False, stream=1):
    fields = [(":status", status), *fields] if status else fields
    return frame(HEADERS, END_HEADERS | ends, stream, block(*fields))


def data(payload, ends=False, stream=1):
    return frame(DATA, int(ends), stream, payload)


def trailers(*fields):
    return head(*fields, status=None, ends=True)


def window(count, stream=1):
    return frame(WINDOW, 0, stream, struct.pack("!L", count))


def reset(code, stream=1):
    return frame(RST, 0, stream, struct.pack("!L", code))


def goaway(last, code=0):
    return frame(GOAWAY, 0, 0, struct.pack("!LL", last, code))


OK = settings() + head() + data(b"ok", ends=True)


class Stream:
    """The agent's stream. ``say()`` is the target's: bytes, exceptions, b"" for its end."""

    id = 2
    window = START_WINDOW

    def __init__(self, *script, events=None):
        self.sent = b""
        self.events = [] if events is None else events
        self.came = queue.Queue()
        self.decoder = Decoder()
        self.deaf = False  # the target has stopped reading
        for item in script:
            self.say(item)

    def say(self, item):
        self.came.put(item)

    def read(self, timeout):
        try:
            item = self.came.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(item, Exception) or item == b"":
            self.came.put(item)
        if isinstance(item, Exception):
            raise item
        return item

    def write(self, data, timeout):
        if self.deaf:
            raise TimeoutError
        self.sent += data

    def frames(self, *kinds):
        """(type, flags, stream, payload) of what the target got."""
        rest, found = self.sent.removeprefix(PREFACE), []
        while len(rest) >= 9:
            high, low, kind, flags, stream = struct.unpack_from("!HBBBL", rest)
            end = 9 + (high << 8 | low)
            found.append((kind, flags, stream, rest[9:end]))
            rest = rest[end:]
        return [each for each in found if not kinds or each[0] in kinds]

    def body(self):
        return b"".join(payload for *_, payload in self.frames(DATA))

    def fields(self):
        """Of the latest header block; those before it have been read."""
        decoder = Decoder()
        for *_, payload in self.frames(HEADERS):
            fields = decoder.decode(payload)
        return [tuple(field) for field in fields]

    def reset(self):
        self.events.append("reset")
        self.say(StreamReset())

    def cut(self):
        self.events.append("cut")
        self.say(StreamReset())

    def close(self):
        self.events.append("close")


def run(visitor, *streams, kept=(), protocol=H2C, response_timeout=SOON, **more):
    tunnel = Tunnel(*streams, kept=kept)
    route = Route(APP, "http", tunnel, host_header=more.pop("host_header", None), protocol=protocol)
    Exchange(visitor, Forward(route, **more), Proxies(), response_timeout).run()


def served(visitor, *script, **more):
    stream = Stream(*script, events=visitor.events)
    run(visitor, stream, **more)
    return stream


def started(visitor, stream, **more):
    """Run an exchange in a thread; the function that waits for its end returns its errors."""
    errors = []

    def serve():
        try:
            run(visitor, stream, **more)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()

    def ended():
        thread.join(SOON)
        assert not thread.is_alive()
        return errors

    return ended


# The request -------------------------------------------------------------------------------------


def test_request_has_the_fields_of_http2_and_none_of_a_connection():
    visitor = Visitor("GET", "/a?b", ("TE", "gzip, trailers"), ("Connection", "TE, X-B"),
                      ("X-B", "1"), ("Cookie", "a=b"))  # fmt: skip
    stream = served(visitor, OK)
    assert stream.sent.startswith(PREFACE)
    assert stream.fields() == [
        (":method", "GET"), (":scheme", "http"), (":authority", "app.example.com:8443"),
        (":path", "/a?b"), ("cookie", "a=b"), ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-proto", "https"), ("x-forwarded-host", "app.example.com:8443"),
        ("x-real-ip", "192.0.2.1"), ("te", "trailers"),
    ]  # fmt: skip
    ((_, flags, number, _),) = stream.frames(HEADERS)
    assert (flags & END, number) == (END, 1) and not stream.frames(DATA)
    assert visitor.events == [("head", 200, [], None), "keep", ("finish", b"ok")]


def test_target_with_tls_is_asked_for_https_and_a_host_of_its_own():
    stream = served(Visitor(), OK, protocol=H2, host_header="intranet:8080")
    assert stream.fields()[1:3] == [(":scheme", "https"), (":authority", "intranet:8080")]


def test_no_value_of_a_field_gets_into_the_log(caplog):
    """The library hpack would write them at debug level."""
    caplog.set_level("DEBUG")
    served(Visitor("GET", "/", ("Cookie", "hidden")), settings() + head(("set-cookie", "hidden")),
           data(b"", ends=True))  # fmt: skip
    assert "hidden" not in caplog.text


def test_settings_give_no_pushes_and_small_headers():
    stream = served(Visitor(), OK)
    payload = stream.frames(SETTINGS)[0][3]
    values = dict(struct.iter_unpack("!HL", payload))
    assert (values[2], values[4], values[6]) == (0, START_WINDOW, 65536)
    assert frame(SETTINGS, ACK, 0) in stream.sent  # the target's


def test_body_at_hand_goes_with_the_head():
    visitor = Visitor("POST", body=2)
    visitor.body.put([b"h", b"i"])
    stream = served(visitor, OK)
    assert ("content-length", "2") in stream.fields() and stream.body() == b"hi"
    assert [flags for _, flags, *_ in stream.frames(DATA)] == [0, END]
    assert visitor.events[1:] == ["keep", ("finish", b"ok")]  # a body is no reason against it


def test_empty_body_ends_at_once():
    stream = served(Visitor("POST", body=0), OK)
    assert [(flags, payload) for _, flags, _, payload in stream.frames(DATA)] == [(END, b"")]


def test_body_flows_beside_the_answer_and_ends_with_its_trailers():
    visitor = Visitor("POST", body=...)
    stream = Stream(settings(), head(), events=visitor.events)
    ended = started(visitor, stream)
    visitor.body.put([b"a"])
    wait_until(lambda: stream.body() == b"a")
    stream.say(data(b"A"))
    wait_until(lambda: ("data", b"A") in visitor.events)
    visitor.trailers = [("X-Sum", "1")]
    visitor.body.put(None)
    wait_until(lambda: len(stream.frames(HEADERS)) == 2)
    assert stream.frames(HEADERS)[1][1] & END and stream.fields() == [("x-sum", "1")]
    stream.say(trailers(("grpc-status", "0"), ("content-type", "x")))
    assert ended() == [] and visitor.events[-2:] == ["keep", ("finish",)]
    assert visitor.trailers_of_the_answer == [("grpc-status", "0")]


def test_body_waits_for_the_targets_window():
    visitor, piece = Visitor("PUT", body=100_000), bytes(100_000)
    stream = Stream(settings(), events=visitor.events)
    visitor.body.put([piece])
    ended = started(visitor, stream)
    wait_until(lambda: len(stream.body()) == 65535)
    stream.say(window(10) + window(1000, stream=0))
    wait_until(lambda: len(stream.body()) == 65545)
    stream.say(settings(window=131_072))
    wait_until(lambda: len(stream.body()) == 66535)  # the connection's window ends here
    stream.say(window(40_000, stream=0))
    wait_until(lambda: len(stream.body()) == 100_000)
    stream.say(head() + data(b"ok", ends=True))
    assert ended() == [] and visitor.events[-2:] == ["keep", ("finish", b"ok")]
    assert max(len(payload) for *_, payload in stream.frames(DATA)) <= 16384


def test_body_moves_on_while_the_visitor_does_not_read_its_answer():
    may_read = threading.Event()

    class Slow(Visitor):
        def send_data(self, pieces):
            super().send_data(pieces)
            may_read.wait(SOON)

    visitor = Slow("POST", body=...)
    stream = Stream(settings(window=10) + head() + data(b"a"), events=visitor.events)
    ended = started(visitor, stream)
    wait_until(lambda: ("data", b"a") in visitor.events)
    visitor.body.put([bytes(100)])
    wait_until(lambda: len(stream.body()) == 10)
    stream.say(data(b"b") + window(90))  # the credit lies behind a part of the answer
    wait_until(lambda: len(stream.body()) == 100)
    may_read.set()
    visitor.body.put(None)
    wait_until(lambda: stream.frames(DATA)[-1][1] == END)
    stream.say(data(b"", ends=True))
    assert ended() == []
    assert b"".join(b for e in visitor.events if e[0] in ("data", "finish") for b in e[1:]) == b"ab"


# The answer --------------------------------------------------------------------------------------


def test_answer_is_passed_on_as_it_comes():
    visitor = Visitor()
    stream = Stream(settings(), head(("server", "x"), ("content-length", "4")), events=[])
    stream.say(data(b"ok") + data(b""))
    stream.say(data(b"ay", ends=True))
    run(visitor, stream)
    assert [event for event in visitor.events if event != ("data",)] == [
        ("head", 200, [("server", "x")], 4), ("data", b"ok"), ("finish", b"ay"),
    ]  # fmt: skip


def test_interim_answers_are_passed_on_and_100_releases_the_body():
    visitor = Visitor("POST", "/", ("Expect", "100-continue"), body=2)
    stream = Stream(settings() + head(("link", "</a>"), status="103") + head(status="100"))
    ended = started(visitor, stream)
    wait_until(lambda: len(visitor.events) == 2)
    assert visitor.events == [("interim", 103, [("link", "</a>")]), ("interim", 100, [])]
    visitor.body.put([b"hi"])
    wait_until(lambda: stream.body() == b"hi")
    stream.say(head(status="204", ends=True))
    assert ended() == [] and visitor.status == 204


def test_answer_of_trailers_only_is_a_head_of_no_body():
    visitor = Visitor("POST", body=0)
    served(visitor, settings() + head(("grpc-status", "12"), ends=True))
    assert visitor.events == [
        ("head", 200, [("grpc-status", "12")], 0), "keep", ("finish",),
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200"), ("GET", "304")])
def test_answer_without_a_body_keeps_its_length(method, status):
    visitor = Visitor(method)
    served(visitor, settings() + head(("content-length", "9"), status=status, ends=True))
    assert visitor.events == [
        ("head", int(status), [("content-length", "9")][:0], 9), "keep", ("finish",),
    ]  # fmt: skip


def test_target_gets_credit_for_what_the_visitor_has_taken_and_no_more():
    visitor = Visitor()
    stream = Stream(settings() + head(), events=visitor.events)
    ended = started(visitor, stream)
    for sent in range(0, START_WINDOW, 16384):
        if sent == START_WINDOW // 2:
            wait_until(lambda: visitor.events.count(("data", bytes(16384))) or 1)
        stream.say(data(bytes(16384)))
    wait_until(lambda: len(stream.frames(WINDOW)) >= 2)  # the first one is the connection's
    credits = [struct.unpack("!L", f[3])[0] for f in stream.frames(WINDOW) if f[2] == 1]
    assert START_WINDOW // 2 <= sum(credits) <= START_WINDOW
    stream.say(data(b"", ends=True))
    assert ended() == []


def test_window_grows_with_that_of_the_agents_stream():
    visitor = Visitor()
    stream = Stream(settings() + head() + data(b"a"), events=visitor.events)
    stream.window = 3 * START_WINDOW
    ended = started(visitor, stream)
    wait_until(lambda: window(2 * START_WINDOW) in stream.sent)
    stream.say(data(b"", ends=True))
    assert ended() == []


def test_ping_is_answered():
    ping = frame(PING, 0, 0, b"12345678")
    stream = served(Visitor(), settings() + ping, head(ends=True))
    assert frame(PING, ACK, 0, b"12345678") in stream.sent


# Kept connections --------------------------------------------------------------------------------


def kept_stream(*script):
    """A stream with a connection that has carried one request."""
    stream = Stream(settings() + head(ends=True))
    run(Visitor(), stream)
    assert stream in http2_target._resting
    stream.came = queue.Queue()
    for item in script:
        stream.say(item)
    return stream


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_kept_connection_carries_the_next_request(method):
    stream = kept_stream(head(stream=3) + data(b"ok", ends=True, stream=3))
    visitor = Visitor(method, "/next", body=2 if method == "POST" else None)
    visitor.body.put([b"hi"])
    run(visitor, kept=[stream])
    assert (":path", "/next") in stream.fields() and stream.sent.count(PREFACE) == 1
    assert visitor.events[-1] == ("finish", b"ok") and stream.events[-1] == "keep"


@pytest.mark.parametrize("end", [reset(REFUSED, stream=3), goaway(1), settings(most_streams=0)])
@pytest.mark.parametrize("body", [None, 2])
def test_request_that_a_kept_connection_refuses_is_sent_again(end, body):
    """Also if it must not arrive twice: the target says that it has not begun with it."""
    stream, fresh = kept_stream(), Stream(OK)
    if end == settings(most_streams=0):
        connection = http2_target._resting[stream]
        connection.h2.receive_data(end)
    else:
        stream.say(end)
    visitor = Visitor("POST", body=body)
    visitor.body.put([b"hi"])
    run(visitor, fresh, kept=[stream])
    assert visitor.events[-1] == ("finish", b"ok") and stream.events[-1] == "close"
    assert fresh.body() == (b"hi" if body else b"")


@pytest.mark.parametrize(
    ("method", "end", "sent_again"),
    [("GET", b"", True), ("GET", StreamReset(), True), ("POST", b"", False)],
)
def test_kept_connection_that_is_stale(method, end, sent_again):
    stream, visitor = kept_stream(end), Visitor(method)
    run(visitor, Stream(OK), kept=[stream])
    assert visitor.status == (200 if sent_again else 502)


def test_request_whose_body_has_not_come_is_not_sent_again():
    visitor = Visitor("POST", body=2)
    run(visitor, Stream(OK), kept=[kept_stream(reset(REFUSED, stream=3))])
    assert (visitor.status, visitor.code) == (502, "cut-short")


@pytest.mark.parametrize(
    "farewell", [goaway(1), head() + goaway(1), head() + data(b"o") + goaway(2**31 - 1)]
)
def test_target_may_go_away_during_its_answer(farewell):
    visitor = Visitor()
    begun = b"" if farewell == goaway(1) else None
    rest = head() + data(b"ok", ends=True) if begun == b"" else data(b"k", ends=True)
    stream = served(visitor, settings() + farewell, rest)
    assert (
        visitor.status == 200
        and visitor.events[-2] == "close"
        and stream not in http2_target._resting
    )


# What goes wrong ---------------------------------------------------------------------------------

MANY = [(f"x-{number}", "1") for number in range(201)]
BOMB = (
    head(("x", "y" * 16_000))[:4] + b"\0" + head(("x", "y" * 16_000))[5:]
    + b"".join(frame(CONTINUATION, 4 * (n == 4), 1, block(("x", "y" * 16_000))) for n in range(5))
)  # fmt: skip
BAD_ANSWERS = {
    "http/1": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    "no settings": head(),
    "an ack for settings": frame(SETTINGS, ACK, 0) + head(ends=True),
    "a frame too large": settings() + struct.pack("!HBBBL", 65, 0, DATA, 0, 1),
    "data first": settings() + data(b"x"),
    "no status": settings() + head(("a", "b"), status=None),
    "two statuses": settings() + head((":status", "200")),
    "a late status": settings() + head(("a", "b"), (":status", "200"), status=None),
    "a request's field": settings() + head((":path", "/")),
    "status 101": settings() + head(status="101"),
    "status 99": settings() + head(status="99"),
    "a name in capitals": settings() + frame(HEADERS, 5, 1, block((":status", "200"), ("Ä", "1"))),
    "a line end": settings() + head(("a", "b\r\nc: d")),
    "a control character": settings() + head(("a", "b\x7f")),
    "a space": settings() + head(("a b", "c")),
    "a colon": settings() + head(("a:b", "c")),
    "two lengths": settings() + head(("content-length", "1"), ("content-length", "2")),
    "a length that is none": settings() + head(("content-length", "+1")),
    "a length without a body": settings() + head(("content-length", "1"), ends=True),
    "too many fields": settings() + head(*MANY),
    "a header list too large": settings() + BOMB,
    "interim answers without end": settings() + head(("a", "b" * 9000), status="103") * 8,
    "an interim answer that ends": settings() + head(status="103", ends=True),
    "a pushed answer": settings() + frame(PUSH, 4, 1, b"\0\0\0\2" + block((":method", "GET"))),
    "another stream": settings() + head(stream=3),
    "a stream of its own": settings() + head(stream=2),
    "continuation alone": settings() + frame(CONTINUATION, 4, 1, b""),
    "another frame in a block": settings() + frame(HEADERS, 0, 1, b"") + window(1),
    "a window beyond its limit": settings() + window(2**31 - 1, stream=0) * 2,
    "a window frame too short": settings() + frame(WINDOW, 0, 0, b"abc"),
    "a bad setting": settings(frame_size=1),
    "a broken block": settings() + frame(HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
    "a short goaway": settings() + frame(GOAWAY, 0, 0, b"1234"),
}  # fmt: skip


@pytest.mark.parametrize("script", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_answer_that_breaks_a_rule_is_a_page_and_ends_the_connection(script):
    visitor = Visitor()
    stream = served(visitor, script, b"")
    assert (visitor.status, visitor.code) == (502, "bad-answer")
    assert "cut" in stream.events and "keep" not in stream.events


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ([b""], "no-answer"),
        ([settings(), b""], "no-answer"),
        ([settings() + head(status="103"), b""], "no-answer"),
        ([settings() + goaway(0)], "no-answer"),
        ([settings() + reset(REFUSED)], "no-answer"),
        ([settings() + reset(INTERNAL)], "cut-short"),
        ([settings() + reset(0)], "cut-short"),
        ([settings() + window(2**31 - 1) * 2], "cut-short"),
        ([StreamReset()], "cut-short"),
    ],
)
def test_target_that_gives_no_answer_is_a_page(script, code):
    visitor = Visitor()
    served(visitor, *script)
    assert (visitor.status, visitor.code) == (502, code)


BEGUN = settings() + head(("content-length", "3")) + data(b"o")


@pytest.mark.parametrize(
    "end",
    [
        b"", StreamReset(), reset(INTERNAL), reset(0), reset(REFUSED), data(b"k", ends=True),
        data(b"kay"), trailers(), head(status="103"), head(), trailers((":status", "200")),
        trailers(("a", "b\0")), trailers(*MANY), goaway(0),
    ],
)  # fmt: skip
def test_answer_that_breaks_off_is_cut_for_its_visitor_too(end):
    visitor = Visitor()
    with pytest.raises(ConnectionAbortedError):
        served(visitor, BEGUN, end)
    assert visitor.events.index("cut") < visitor.events.index("abort")
    assert not any(event[0] == "finish" for event in visitor.events)


def test_payload_in_an_answer_without_a_body_is_not_passed_on():
    visitor = Visitor("HEAD")
    stream = served(visitor, settings() + head(), data(b"x", ends=True))
    assert visitor.events == [("head", 200, [], None), "close", ("finish",)]
    assert stream not in http2_target._resting


def test_visitor_that_leaves_cancels_the_request():
    visitor = Visitor()
    stream = Stream(settings(), events=visitor.events)
    ended = started(visitor, stream)
    wait_until(lambda: frame(SETTINGS, ACK, 0) in stream.sent)
    visitor.left = True
    (error,) = ended()
    assert type(error).__name__ == "VisitorGone"
    assert stream.sent.endswith(reset(CANCEL)) and stream.events == ["cut"]


def test_visitor_that_leaves_ends_the_upload_that_waits_for_a_window(caplog):
    visitor = Visitor("POST", body=100_000)
    visitor.body.put([bytes(100_000)])
    stream = Stream(settings(), events=visitor.events)
    ended = started(visitor, stream)
    wait_until(lambda: len(stream.body()) == 65535)
    visitor.left = True
    (error,) = ended()
    assert type(error).__name__ == "VisitorGone" and "bug" not in caplog.text
    assert stream.events == ["cut"]


@pytest.mark.parametrize("code", [0, CANCEL])
def test_answer_is_whole_though_the_target_wants_no_more_of_the_body(code):
    visitor = Visitor("POST", body=...)
    stream = Stream(settings() + head() + data(b"ok", ends=True) + reset(code), events=[])
    assert started(visitor, stream)() == []
    assert ("finish", b"ok") in visitor.events
    assert stream.events == ["cut"] and "refuse body" in visitor.events


def test_target_that_grants_nothing_is_not_waited_for_without_bound():
    visitor = Visitor("POST", body=100_000)
    visitor.body.put([bytes(100_000)])
    assert started(visitor, Stream(settings()), response_timeout=0.2)() == []
    assert (visitor.status, visitor.code) == (504, "timed-out")


def test_target_that_only_pings_is_slowed_down_and_not_waited_for(monkeypatch):
    slept = []
    monkeypatch.setattr("gotunnel_server.visitors.work.sleep", slept.append)
    monkeypatch.setattr(http2_target, "FRAME_BURST", 100)
    visitor = Visitor()
    stream = Stream(settings(), frame(PING, 0, 0, b"8" * 8) * 1100)
    assert started(visitor, stream, response_timeout=0.2)() == []
    assert (visitor.status, visitor.code) == (504, "timed-out")
    assert slept[0] == pytest.approx(1000 / http2_target.FRAME_RATE, rel=0.1)


def test_target_that_pings_and_reads_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(http2_target, "MOST_REPLIES", 1000)
    visitor = Visitor()
    served(visitor, settings(), frame(PING, 0, 0, b"8" * 8) * 100)
    assert (visitor.status, visitor.code) == (502, "cut-short")


def test_upgrade_is_not_passed_on():
    visitor = Visitor("GET", "/", ("Upgrade", "websocket"), wants_upgrade=True)
    run(visitor)
    assert (visitor.status, visitor.code) == (501, "no-upgrade")


def test_frames_in_any_pieces_are_the_same():
    visitor = Visitor()
    script = settings() + head() + data(b"ok") + trailers(("a", "b"))
    served(visitor, *(script[at : at + 1] for at in range(len(script))))
    assert visitor.events[0][:2] == ("head", 200)
    assert (
        b"".join(b for event in visitor.events[1:] for b in event[1:] if event != "keep") == b"ok"
    )
    assert visitor.trailers_of_the_answer == [("a", "b")]


def test_connections_are_not_mixed_up():
    """Twenty requests at once over ten connections: each gets its own answer."""
    streams = [kept_stream() for _ in range(10)]

    def ask(number):
        stream = streams[number % 10]
        visitor = Visitor("GET", f"/{number}")
        for turn in range(3):
            at = 3 + 2 * turn
            stream.say(head(stream=at) + data(b"%d" % number, ends=True, stream=at))
            run(visitor, kept=[stream])
            assert visitor.events[-1] == ("finish", b"%d" % number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert all(stream in http2_target._resting for stream in streams)
    time.sleep(0)
