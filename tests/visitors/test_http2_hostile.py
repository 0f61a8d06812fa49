"""HTTP/2 visitors that break rules, or keep them and flood: each is stopped by the right code, and
nobody else notices."""

import os
import random

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack import Decoder, Encoder, HPACKError
from hpack.hpack import encode_integer
from http2_by_hand import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PRIORITY_UPDATE,
    PUSH_PROMISE,
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
from support import APP, agent_here, answer, dial_tls, gateway_here, wait_until

from gotunnel_agent.common.http1 import Malformed
from gotunnel_server.visitors import http2_hpack, http2_screen
from gotunnel_server.visitors.http2_frames import MOST_STREAMS, Came, Frames, Requested
from gotunnel_server.visitors.http2_head import read_head, read_trailers, read_urgency
from gotunnel_server.visitors.http2_screen import Fault, Screen

EMPTY = frame(SETTINGS)


@pytest.fixture
def gateway(cache, tmp_path, origin):
    origin.serve(lambda target: (target.read_message(), target.send(answer(b"ok"))))
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            yield gateway


# Rules, by the frames alone ----------------------------------------------------------------------


class Rules:
    """A connection without I/O: what its bytes lead to."""

    def __init__(self, first=EMPTY):
        self.screen, self.frames = Screen(), Frames()
        self.frames.take()
        self.feed(PREFACE + first)

    def feed(self, data, now=100.0):
        return [
            event
            for found in self.screen.feed(data, now)
            for event in self.frames.receive(found)
        ]  # fmt: skip


def string(text):
    """A string in HPACK, without Huffman's code."""
    return bytes(encode_integer(len(text), 7)) + text.encode()


def block(*fields, **pseudo):
    """A header block whose fields are in no table, so that it can be sent again and again."""
    return b"".join(
        b"\x00" + string(name) + string(value) for name, value in head(*fields, **pseudo)
    )


ASKED = frame(HEADERS, END_HEADERS, 1, block())
ENDED = frame(HEADERS, END_HEADERS | END_STREAM, 1, block())

BREAKS = {
    "no SETTINGS first": (frame(PING, 0, 0, b"12345678"), "PROTOCOL_ERROR"),
    "frame too large": (EMPTY + frame(DATA, 0, 1, b"x" * 16_385), "FRAME_SIZE_ERROR"),
    "DATA on stream 0": (EMPTY + frame(DATA, 0, 0, b"x"), "PROTOCOL_ERROR"),
    "DATA on an idle stream": (EMPTY + frame(DATA, 0, 1, b"x"), "PROTOCOL_ERROR"),
    "HEADERS on stream 0": (EMPTY + frame(HEADERS, 4, 0, block()), "PROTOCOL_ERROR"),
    "even stream": (EMPTY + frame(HEADERS, 4, 2, block()), "PROTOCOL_ERROR"),
    "stream that is lower": (EMPTY + frame(HEADERS, 5, 5, block()) + ASKED, "PROTOCOL_ERROR"),
    "broken HPACK": (EMPTY + frame(HEADERS, 4, 1, b"\xff\xff\xff\xff\xff"), "COMPRESSION_ERROR"),
    "padding too long": (EMPTY + ASKED + frame(DATA, PADDED, 1, b"\x05abc"), "PROTOCOL_ERROR"),
    "padding that lacks": (EMPTY + ASKED + frame(DATA, PADDED, 1), "FRAME_SIZE_ERROR"),
    "CONTINUATION alone": (EMPTY + frame(CONTINUATION, 4, 1, b""), "PROTOCOL_ERROR"),
    "DATA in a header block": (
        EMPTY + frame(HEADERS, 0, 1, b"") + frame(DATA, 0, 1, b"x"), "PROTOCOL_ERROR"),
    "other stream in a block": (
        EMPTY + frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 4, 3, b""), "PROTOCOL_ERROR"),
    "depends on itself": (EMPTY + frame(PRIORITY, 0, 3, number(3) + b"\0"), "PROTOCOL_ERROR"),
    "HEADERS that depend on themselves": (
        EMPTY + frame(HEADERS, 4 | PRIORITISED, 1, number(1) + b"\0" + block()), "PROTOCOL_ERROR"),
    "PRIORITY of 4 bytes": (EMPTY + frame(PRIORITY, 0, 3, b"1234"), "FRAME_SIZE_ERROR"),
    "PRIORITY on stream 0": (EMPTY + frame(PRIORITY, 0, 0, b"12345"), "PROTOCOL_ERROR"),
    "RST_STREAM of 3 bytes": (EMPTY + ASKED + frame(RST_STREAM, 0, 1, b"123"), "FRAME_SIZE_ERROR"),
    "RST_STREAM of an idle stream": (EMPTY + frame(RST_STREAM, 0, 1, b"1234"), "PROTOCOL_ERROR"),
    "SETTINGS on a stream": (EMPTY + frame(SETTINGS, 0, 1), "PROTOCOL_ERROR"),
    "SETTINGS of 5 bytes": (EMPTY + frame(SETTINGS, 0, 0, b"12345"), "FRAME_SIZE_ERROR"),
    "ACK with SETTINGS": (EMPTY + frame(SETTINGS, ACK, 0, b"123456"), "FRAME_SIZE_ERROR"),
    "push of 2": (EMPTY + settings(s2=2), "PROTOCOL_ERROR"),
    "window of 2^31": (EMPTY + settings(s4=2**31), "FLOW_CONTROL_ERROR"),
    "window grown beyond 2^31": (
        EMPTY + ASKED + frame(WINDOW_UPDATE, 0, 1, number(2**31 - 1 - 65_535)) + settings(s4=2**20),
        "FLOW_CONTROL_ERROR"),
    "frame size of 100": (EMPTY + settings(s5=100), "PROTOCOL_ERROR"),
    "PUSH_PROMISE": (EMPTY + ASKED + frame(PUSH_PROMISE, 4, 1, number(2)), "PROTOCOL_ERROR"),
    "PING on a stream": (EMPTY + frame(PING, 0, 1, b"12345678"), "PROTOCOL_ERROR"),
    "PING of 6 bytes": (EMPTY + frame(PING, 0, 0, b"123456"), "FRAME_SIZE_ERROR"),
    "GOAWAY on a stream": (EMPTY + frame(GOAWAY, 0, 1, b"12345678"), "PROTOCOL_ERROR"),
    "GOAWAY of 4 bytes": (EMPTY + frame(GOAWAY, 0, 0, b"1234"), "FRAME_SIZE_ERROR"),
    "credit of 0": (EMPTY + frame(WINDOW_UPDATE, 0, 0, number(0)), "PROTOCOL_ERROR"),
    "credit beyond 2^31": (
        EMPTY + frame(WINDOW_UPDATE, 0, 0, number(2**31 - 1)), "FLOW_CONTROL_ERROR"),
    "credit of 3 bytes": (EMPTY + frame(WINDOW_UPDATE, 0, 0, b"123"), "FRAME_SIZE_ERROR"),
    "credit for an idle stream": (EMPTY + frame(WINDOW_UPDATE, 0, 1, b"1234"), "PROTOCOL_ERROR"),
    "DATA beyond the connection's window": (
        EMPTY + b"".join(frame(HEADERS, 4, stream, block()) for stream in range(1, 11, 2))
        + b"".join(frame(DATA, 0, 1 + 2 * (n // 4), b"x" * 16_384) for n in range(17)),
        "FLOW_CONTROL_ERROR"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "code"), BREAKS.values(), ids=BREAKS)
def test_broken_rule_ends_the_connection_with_its_code(data, code):
    with pytest.raises(Fault) as caught:
        Rules(data)
    assert caught.value.code.name == code


CLOSED = EMPTY + ASKED + frame(RST_STREAM, 0, 1, number(8))

STREAM_ERRORS = {
    "DATA behind the end": (EMPTY + ENDED, frame(DATA, 0, 1, b"x"), 5),
    "HEADERS behind the end": (EMPTY + ENDED, ASKED, 5),
    "DATA behind the visitor's reset": (CLOSED, frame(DATA, 0, 1, b"x"), 5),
    "trailers without END_STREAM": (EMPTY + ASKED, ASKED, 1),
    "credit of 0": (EMPTY + ASKED, frame(WINDOW_UPDATE, 0, 1, number(0)), 1),
    "credit beyond 2^31": (EMPTY + ASKED, frame(WINDOW_UPDATE, 0, 1, number(2**31 - 1)), 3),
    "DATA beyond the stream's window": (
        EMPTY + ASKED + frame(DATA, 0, 1, b"x" * 16_384) * 4, frame(DATA, 0, 1, b"x"), 3),
}  # fmt: skip


@pytest.mark.parametrize(("before", "data", "code"), STREAM_ERRORS.values(), ids=STREAM_ERRORS)
def test_error_of_a_stream_resets_that_stream_alone(before, data, code):
    rules = Rules(before)
    rules.frames.take()
    rules.feed(data)
    assert frame(RST_STREAM, 0, 1, number(code)) in rules.frames.take()
    assert rules.feed(frame(HEADERS, 5, 3, block()))


def test_answered_stream_takes_no_further_frames():
    rules = Rules(EMPTY + ENDED)
    rules.frames.send_head(1, [(":status", "204")], True)
    with pytest.raises(Fault) as caught:
        rules.feed(frame(DATA, 0, 1, b"x"))
    assert caught.value.code.name == "STREAM_CLOSED"


def test_frames_that_were_under_way_when_we_reset_a_stream_are_dropped():
    rules = Rules(EMPTY + ASKED)
    rules.frames.reset(1, http2_screen.Code.CANCEL)
    rules.frames.take()
    late = frame(DATA, 0, 1, b"xyz") + ASKED + frame(WINDOW_UPDATE, 0, 1, number(1))
    assert rules.feed(late) == [Came(1, b"", 3, False)]  # its bytes are granted again
    assert rules.frames.take() == b""


@pytest.mark.parametrize(
    ("flood", "limit"),
    [
        (frame(SETTINGS), http2_screen.IDLE_FRAMES_BURST),
        (frame(PING, 0, 0, b"12345678"), http2_screen.IDLE_FRAMES_BURST),
        (frame(PRIORITY, 0, 3, number(0) + b"\0"), http2_screen.IDLE_FRAMES_BURST),
        (frame(DATA, 0, 1), http2_screen.IDLE_FRAMES_BURST),
        (frame(DATA, PADDED, 1, b"\x02\0\0"), http2_screen.IDLE_FRAMES_BURST),
        (frame(WINDOW_UPDATE, 0, 0, number(1)), http2_screen.IDLE_FRAMES_BURST),
        (frame(99, 0, 0, b""), http2_screen.IDLE_FRAMES_BURST),
        (frame(RST_STREAM, 0, 1, number(8)), http2_screen.RESETS_BURST),
    ],
    ids=["SETTINGS", "PING", "PRIORITY", "empty DATA", "padding alone", "WINDOW_UPDATE", "unknown",
         "RST_STREAM"],
)  # fmt: skip
def test_flood_of_frames_without_payload_ends_the_connection(flood, limit):
    rules = Rules(EMPTY + ASKED)
    rules.feed(flood * (limit - 2))
    for _ in range(15):  # a second later there are some more
        rules.feed(flood, now=101.0)
    with pytest.raises(Fault) as caught:
        rules.feed(flood * (limit + 10), now=101.0)
    assert caught.value.code.name == "ENHANCE_YOUR_CALM"


def test_rapid_reset_is_stopped():
    """CVE-2023-44487: streams are opened and reset at once."""
    rules, opened = Rules(), 0
    with pytest.raises(Fault) as caught:
        for stream in range(1, 100_000, 2):
            rules.feed(frame(HEADERS, 5, stream, block()) + frame(RST_STREAM, 0, stream, b"1234"))
            opened += 1
    assert caught.value.code.name == "ENHANCE_YOUR_CALM"
    assert opened <= http2_screen.RESETS_BURST


def test_visitor_that_gets_payload_may_acknowledge_all_of_it():
    rules = Rules(EMPTY + ASKED)
    for _ in range(5 * http2_screen.IDLE_FRAMES_BURST):
        rules.screen.note_sent(16_384)
        rules.feed(frame(WINDOW_UPDATE, 0, 0, number(1)))


@pytest.mark.parametrize(
    "parts", [[b""] * 17, [b"x" * 16_384] * 4, [b"x"] * 17], ids=["empty", "large", "tiny"]
)
def test_endless_header_block_is_stopped(parts):
    """CVE-2024-27316: CONTINUATION frames without an end."""
    rules = Rules(EMPTY + frame(HEADERS, 0, 1, b"x"))
    with pytest.raises(Fault) as caught:
        for part in parts:
            rules.feed(frame(CONTINUATION, 0, 1, part))
    assert caught.value.code.name == "ENHANCE_YOUR_CALM"


def test_header_list_that_is_far_larger_than_its_block_is_stopped():
    """An HPACK bomb: one long field, and thousands of references to it."""
    field = b"\x40" + string("x") + string("v" * 3000)
    with pytest.raises(Fault) as caught:
        Rules(EMPTY + frame(HEADERS, 5, 1, field + b"\xbe" * 1000))
    assert caught.value.code.name == "ENHANCE_YOUR_CALM"


def test_tiny_frames_are_read_slowly():
    rules = Rules(EMPTY + ASKED)
    assert rules.screen.pause(100.0) == 0
    rules.feed(frame(DATA, 0, 1, b"x") * 30_000)
    assert rules.screen.pause(100.0) > 1
    rules = Rules(EMPTY + ASKED)
    for _ in range(100):
        rules.frames.grant(16_384)
        rules.frames.grant(16_384, 1)
        rules.feed(frame(DATA, 0, 1, b"x" * 16_384))
    assert rules.screen.pause(100.0) == 0


def test_frames_are_the_same_byte_by_byte():
    data = PREFACE + EMPTY + frame(HEADERS, END_STREAM, 1, block()[:9])
    data += frame(CONTINUATION, END_HEADERS, 1, block()[9:]) + frame(PING, 0, 0, b"12345678")
    whole, slowly = Screen(), Screen()
    expected = list(whole.feed(data, 0.0))
    found = [item for byte in data for item in slowly.feed(bytes([byte]), 0.0)]
    assert found == expected and len(expected) == 3
    assert not slowly.in_message


def test_whatever_comes_is_an_event_or_a_fault():
    dice = random.Random(20_261_130)
    kinds = [*range(11), 16, 99]
    faults = 0
    for _ in range(3000):
        rules = Rules()
        try:
            for _ in range(2):
                size = dice.choice([0, 1, 4, 5, 6, 8, 20])
                payload = dice.choice([block(), dice.randbytes(size), number(dice.randrange(9))])
                rules.feed(frame(dice.choice(kinds), dice.randrange(64), dice.choice(
                    [0, 1, 1, 2, 3, 5]), payload))  # fmt: skip
                rules.frames.take()
        except Fault:
            faults += 1
    assert 100 < faults < 3000


def test_rules_agree_with_those_of_h2():
    """The library h2 as the visitor: random requests, bodies and resets, with its state machine
    behind each frame that we send."""
    dice = random.Random(9113)
    for _ in range(30):
        visitor = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        visitor.initiate_connection()
        screen, frames = Screen(), Frames()
        open_ones, asked = {}, 0
        for _ in range(60):
            stream = dice.choice([*open_ones, None])
            if stream is None and len(open_ones) < MOST_STREAMS:
                stream = visitor.get_next_available_stream_id()
                ends = dice.random() < 0.5
                visitor.send_headers(stream, head(("x", "y" * dice.randrange(200))), ends)
                open_ones[stream] = ends
            elif not open_ones[stream]:
                size = min(dice.randrange(5000), visitor.local_flow_control_window(stream))
                open_ones[stream] = dice.random() < 0.5
                visitor.send_data(stream, b"x" * size, open_ones[stream])
            for found in screen.feed(visitor.data_to_send(), 0.0):
                for event in frames.receive(found):
                    asked += isinstance(event, Requested)
                    if isinstance(event, Came):
                        frames.grant(event.flow or 1)
            if stream is not None and open_ones[stream] and dice.random() < 0.7:
                del open_ones[stream]
                frames.send_head(stream, [(":status", "200"), ("x-a", "b" * 300)], False)
                size = min(dice.randrange(16_000), frames.permitted(stream))
                frames.send_data(stream, b"x" * size, True)
            visitor.receive_data(frames.take())  # raises for anything that is wrong
        assert asked


def test_header_lists_are_read_by_another_decoder():
    decoder = Decoder()
    fields = [
        (":status", "200"), (":status", "299"), ("set-cookie", "s" * 300), ("x-own", ""),
        ("content-length", "0"), ("x" * 400, "y" * 70_000), ("accept-encoding", "\xe4"),
    ]  # fmt: skip
    decoder.max_header_list_size = 2**20
    found = decoder.decode(http2_hpack.NO_TABLE + http2_hpack.encode(fields), raw=True)
    assert [tuple(item) for item in found] == raw(fields)
    assert not found[2].indexable  # Set-Cookie is never indexed


# Integers, strings and tables (RFC 7541), each at a limit of its own
BLOCKS = [
    b"", b"\x80", b"\xbe", b"\xff\x80\x80\x80\x00", b"\xff" * 9, b"\xff" + b"\x80" * 9, b"\x00",
    b"\x00\x01", b"\x40\x01a\x05b", b"\x00\x81\xff\x00", b"\x00\x82\xff\xff\x01a", b"\x7f\x80",
    b"\x3f\xe1\x1f\x82", b"\x3f\xe2\x1f", b"\x20\x82", b"\x82\x20", b"\x20\x3f\xe1\x1f\x82",
    b"\x0f" + b"\x80" * 4 + b"\x00\x01x", b"\x0f" + b"\x80" * 5 + b"\x00\x01x",
    b"\x0f\x2f\x01x", b"\x1f\x00\x00", b"\x41" + string("y" * 2000),
    b"\x40\x01a" + string("x" * 4100),
]  # fmt: skip


def decoded(decode, data, **options):
    """What decode() returns, or None if the block is refused."""
    try:
        return decode(data, **options)
    except (*http2_hpack.BROKEN, HPACKError, http2_hpack.TooLarge):
        return None


def both_read(theirs, ours, data) -> bool:
    """Whether the library's decoder has read the block; ours must agree with it."""
    expected = decoded(theirs.decode, data, raw=True)
    found = decoded(ours.decode, data)
    if expected is None:
        assert found is None, data
        return False
    assert found is not None, data
    assert raw(found[0]) == [tuple(item) for item in expected]
    assert found[1] == sum(32 + len(name) + len(value) for name, value in expected)
    return True


@pytest.mark.parametrize("data", BLOCKS)
def test_odd_header_block_is_read_or_refused_as_by_another_decoder(data):
    theirs, ours = Decoder(), http2_hpack.Decoder(65_536)
    for sent in (data, b"\x40" + string("a") + string("b"), data, b"\xbe"):
        if not both_read(theirs, ours, sent):
            break


def test_header_blocks_are_read_as_by_another_decoder():
    """Blocks of the library hpack, some of them damaged, until one is refused; then a connection
    begins anew."""
    dice = random.Random(7541)
    refused = read = 0
    for _ in range(200):
        encoder, theirs, ours = Encoder(), Decoder(), http2_hpack.Decoder(65_536)
        encoder.header_table_size = dice.choice([0, 60, 300, 4096])
        for _ in range(8):
            fields = [
                (dice.choice([":path", "cookie", "x-a", "accept", "\xe4"]),
                 "".join(map(chr, dice.choices(range(256), k=dice.choice([0, 1, 9, 130])))))
                for _ in range(dice.randrange(6))
            ]  # fmt: skip
            data = bytearray(encoder.encode(raw(fields), huffman=dice.random() < 0.5))
            if data and dice.random() < 0.2:
                data[dice.randrange(len(data))] = dice.randrange(256)
            if not both_read(theirs, ours, bytes(data)):
                refused += 1
                break
            read += 1
    assert refused > 20 and read > 200


def test_dynamic_table_is_emptied_by_a_field_that_is_larger():
    decoder = http2_hpack.Decoder(65_536)
    decoder.decode(b"\x40" + string("a") + string("b"))
    assert decoder.decode(b"\xbe")[0] == [("a", "b")]
    decoder.decode(b"\x40" + string("a") + string("x" * 4096))
    with pytest.raises(http2_hpack.BROKEN):
        decoder.decode(b"\xbe")


# Requests that HTTP/1.1 could not say ------------------------------------------------------------

GOOD = head()
MALFORMED = {
    "upper case": [*GOOD, ("X-A", "b")],
    "CR in a value": [*GOOD, ("x", "a\rb")],
    "LF in a value": [*GOOD, ("x", "a\nhost: b")],
    "NUL in a value": [*GOOD, ("x", "a\0b")],
    "space before a value": [*GOOD, ("x", " a")],
    "tab behind a value": [*GOOD, ("x", "a\t")],
    "space in a name": [*GOOD, ("x y", "a")],
    "LF in a name": [*GOOD, ("x\ny", "a")],
    "colon in a name": [*GOOD, ("x:y", "a")],
    "empty name": [*GOOD, ("", "a")],
    "connection": [*GOOD, ("connection", "close")],
    "proxy-connection": [*GOOD, ("proxy-connection", "close")],
    "keep-alive": [*GOOD, ("keep-alive", "5")],
    "transfer-encoding": [*GOOD, ("transfer-encoding", "chunked")],
    "upgrade": [*GOOD, ("upgrade", "h2c")],
    "te": [*GOOD, ("te", "gzip")],
    "unknown pseudo-header": [*GOOD, (":x", "y")],
    "pseudo-header of an answer": [*GOOD, (":status", "200")],
    "pseudo-header behind fields": [("x", "y"), *GOOD],
    "pseudo-header twice": [*GOOD, (":path", "/")],
    "no method": head(method=None),
    "no path": head(path=None),
    "empty path": head(path=""),
    "no scheme": head(scheme=None),
    "other scheme": head(scheme="ftp"),
    "no authority": head(host=None),
    "other host": head(("host", "b.test"), host="a.test"),
    "two hosts": head(("host", "a.test"), ("host", "a.test"), host=None),
    "userinfo": head(host="me@a.test"),
    "space in the path": head(path="/a b"),
    "LF in the path": head(path="/a\nb"),
    "path that is a URL": head(path="http://a.test/"),
    "path of an asterisk": head(path="*"),
    "fragment": head(path="/a#b"),
    "space in the method": head(method="GET /x"),
    "LF in the method": head(method="GET\n"),
    "CONNECT with a path": head(method="CONNECT"),
    "protocol without CONNECT": head((":protocol", "websocket")),
    "two lengths": [*GOOD, ("content-length", "1"), ("content-length", "1")],
    "length that is no number": [*GOOD, ("content-length", "+1")],
    "length of 19 digits": [*GOOD, ("content-length", "1" * 19)],
}


def raw(fields):
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_is_refused(fields):
    with pytest.raises(Malformed):
        read_head(fields, False)


@pytest.mark.parametrize(
    ("fields", "ended", "attributes"),
    [
        (GOOD, True, {"hostname": APP, "has_body": False, "path": "/", "urgency": 3}),
        (GOOD, False, {"has_body": True, "body_length": None}),
        (head(method="POST"), True, {"has_body": True, "body_length": 0}),
        ([*GOOD, ("content-length", "7")], False, {"has_body": True, "body_length": 7}),
        (head(path="*", method="OPTIONS"), True, {"path": "*"}),
        (head(path="/ä".encode().decode("latin-1")), True, {"path": "/Ã¤"}),
        (head(("host", "A.test:1"), host="a.TEST:1"), True, {"hostname": "a.test"}),
        (head(("host", "a.test"), host=None), True, {"hostname": "a.test", "authority": "a.test"}),
        (head(("te", "trailers"), ("priority", "u=6")), True, {"urgency": 6}),
        (head(method="CONNECT", path=None, scheme=None, host="a.test:22"), False,
         {"hostname": "a.test", "authority": "a.test:22", "path": "", "has_body": False}),
        (head((":protocol", "websocket"), method="CONNECT"), False,
         {"protocol": "websocket", "path": "/", "has_body": False}),
    ],
)  # fmt: skip
def test_good_request_is_translated(fields, ended, attributes):
    found = read_head(fields, ended)
    assert {name: getattr(found, name) for name in attributes} == attributes


def test_length_without_a_body_is_malformed():
    with pytest.raises(Malformed):
        read_head([*GOOD, ("content-length", "7")], True)


def test_trailers_lose_what_a_target_might_take_for_a_field():
    fields = [("x-sum", "1"), ("content-length", "3"), ("authorization", "x"), ("host", "b")]
    assert read_trailers(fields) == [("x-sum", "1")]
    for bad in ((":path", "/"), ("transfer-encoding", "chunked"), ("x", "a\nb")):
        with pytest.raises(Malformed):
            read_trailers([bad])


@pytest.mark.parametrize(
    ("priority", "urgency"),
    [("u=0", 0), ("u=7, i", 7), ("i, u=2", 2), ("i", 3), ("u=9", 3), ("u=1.5", 3), ("xu=1", 3)],
)
def test_urgency(priority, urgency):
    assert read_urgency(priority) == urgency


# Through a gateway -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["connection", "LF in a value", "space in the path", "no scheme"])
def test_malformed_request_resets_its_stream_and_never_reaches_the_target(gateway, origin, name):
    with http2_visitor(gateway) as visitor:
        visitor.send(visitor.headers(1, MALFORMED[name]))
        assert visitor.outcome(1) == "PROTOCOL_ERROR"
        visitor.ask(3)
        assert visitor.answer(3)[2] == b"ok"


@pytest.mark.parametrize(
    ("body", "flags"), [(b"12345", 0), (b"12", END_STREAM), (b"12345", END_STREAM)]
)
def test_body_that_does_not_fit_its_length_resets_its_stream(gateway, body, flags):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, ("content-length", "3"), method="PUT", end=False)
        visitor.send(frame(DATA, flags, 1, body))
        assert visitor.outcome(1) == "PROTOCOL_ERROR"
        visitor.ask(3)
        assert visitor.answer(3)[2] == b"ok"


def test_trailers_that_come_too_early_are_a_wrong_length(gateway):
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, ("content-length", "3"), method="PUT", end=False)
        visitor.send(frame(DATA, 0, 1, b"12"), visitor.headers(1, [("x", "y")]))
        assert visitor.outcome(1) == "PROTOCOL_ERROR"


FLOODS = {
    "SETTINGS": frame(SETTINGS),
    "PING": frame(PING, 0, 0, b"12345678"),
    "rapid reset": None,
    "malformed": None,
    "CONTINUATION": frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1) * 100,
    "bad preface": b"",
}


@pytest.mark.parametrize("kind", FLOODS)
def test_flood_ends_its_connection_and_nobody_else_notices(gateway, kind):
    with http2_visitor(gateway) as other, http2_visitor(gateway) as visitor:
        other.ask(1)
        flood, code = FLOODS[kind], "ENHANCE_YOUR_CALM"
        try:
            if kind == "bad preface":
                with dial_tls(gateway.public_port, APP, context_for(gateway)) as wire:
                    wire.send(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(100))
                    assert wire.read_to_end()
                visitor.send(frame(GOAWAY, 0, 1, b"12345678"))
                code = "PROTOCOL_ERROR"
            elif kind == "rapid reset":
                for stream in range(1, 1001, 2):
                    visitor.ask(stream)
                    visitor.send(frame(RST_STREAM, 0, stream, number(8)))
            elif kind == "malformed":
                for stream in range(1, 1001, 2):
                    visitor.ask(stream, ("connection", "x"))
            else:
                for _ in range(3000):
                    visitor.send(flood)
        except OSError:
            pass  # the gateway has closed meanwhile; its GOAWAY has come before
        assert visitor.goodbye()[1] == code
        assert other.answer(1)[2] == b"ok"
        other.ask(3)
        assert other.answer(3)[2] == b"ok"


def test_replies_that_nobody_reads_end_the_connection(gateway, monkeypatch):
    monkeypatch.setattr(http2_screen, "IDLE_FRAMES_BURST", 10**9)
    monkeypatch.setattr(http2_screen, "PACE_BURST", 10**9)
    with http2_visitor(gateway) as visitor:
        with pytest.raises(OSError):
            for _ in range(100_000):
                visitor.send(frame(PING, 0, 0, b"12345678") * 1000)
    reader = gateway.inner._visitors.http2.reader
    wait_until(lambda: not reader._known)


def test_connection_that_was_paused_goes_on_with_what_tls_holds(gateway, monkeypatch):
    """One TLS record has more frames than one read takes, and nothing comes behind it."""
    monkeypatch.setattr(http2_screen, "PACE_BURST", 10)
    with http2_visitor(gateway) as visitor:
        visitor.ask(1, method="PUT", end=False)
        visitor.send(frame(DATA, 0, 1, b"x") * 1500)
        visitor.send(frame(DATA, END_STREAM, 1, b"y"), frame(PING, 0, 0, b"12345678"))
        assert visitor.wait_for(PING)[3] == b"12345678"
        assert visitor.answer(1)[2] == b"ok"


def test_priority_update_of_an_unknown_stream_is_ignored(gateway):
    with http2_visitor(gateway) as visitor:
        visitor.send(frame(PRIORITY_UPDATE, 0, 0, number(99) + b"u=1"))
        visitor.ask(1)
        assert visitor.answer(1)[2] == b"ok"
        visitor.send(frame(PRIORITY_UPDATE, 0, 1, b"1234"))
        assert visitor.goodbye()[1] == "PROTOCOL_ERROR"


def test_a_header_list_may_be_as_large_as_its_limit_and_no_byte_larger():
    """Indexed fields, too, count with all their bytes, though one byte on the line names each."""
    field = ("name", "v" * 10)  # 4 + 10 + 32 bytes
    block = Encoder().encode([field] * 4)  # the first is put in the table, the others lead there
    assert http2_hpack.Decoder(4 * 46).decode(block) == ([field] * 4, 4 * 46)
    with pytest.raises(http2_hpack.TooLarge):
        http2_hpack.Decoder(4 * 46 - 1).decode(block)
