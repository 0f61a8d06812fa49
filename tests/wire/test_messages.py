"""Control messages and the data header, by bytes and row by row."""

import json
import random

import pytest

from gotunnel import (
    HALF_CLOSE,
    HOST_HEADER,
    HTTP2,
    MESSAGE_LIMIT,
    NAMES,
    PARTIAL,
    UNKNOWN_KINDS,
    UNKNOWN_LEAST,
    UNKNOWN_LIMIT,
    URLS,
    Ack,
    Ends,
    MessageReader,
    Ping,
    Pong,
    Port,
    ProtocolError,
    Register,
    decode_message,
    encode_data_header,
    encode_message,
    read_data_header,
)

# Both ways: what Go's json.Encoder writes for the same message, but for the order of its fields.
WIRE = [
    (
        Register("t.o.k", {"app.example.com": "127.0.0.1:8080"}, {"app.example.com": "http"}),
        b'{"type":"register","token":"t.o.k","routes":{"app.example.com":"127.0.0.1:8080"},'
        b'"modes":{"app.example.com":"http"}}\n',
    ),
    (
        Register("t", {}, {}, (HALF_CLOSE, "other")),
        b'{"type":"register","token":"t","routes":{},"modes":{},'
        b'"features":["half_close","other"]}\n',
    ),
    (
        Register("t", {}, {}, (HOST_HEADER,), {"app.example.com": "intranet:8080"}),
        b'{"type":"register","token":"t","routes":{},"modes":{},"features":["host_header"],'
        b'"host_headers":{"app.example.com":"intranet:8080"}}\n',
    ),
    (
        Register("t", {}, {}, (HTTP2,), protocols={"grpc.example.com": "h2c"}),
        b'{"type":"register","token":"t","routes":{},"modes":{},"features":["http2"],'
        b'"protocols":{"grpc.example.com":"h2c"}}\n',
    ),
    (Ack(True), b'{"type":"ack","ok":true}\n'),
    (Ack(True, features=(HALF_CLOSE,)), b'{"type":"ack","ok":true,"features":["half_close"]}\n'),
    (Ack(False, "auth failed"), b'{"type":"ack","ok":false,"error":"auth failed"}\n'),
    (Port("a.example", "2222"), b'{"type":"port","hostname":"a.example","port":"2222"}\n'),
    (
        Port("a.example", "2222", "tcp://a.example:2222"),
        b'{"type":"port","hostname":"a.example","port":"2222","url":"tcp://a.example:2222"}\n',
    ),
    (
        Ack(
            True,
            features=(URLS, NAMES, PARTIAL),
            denied={"b.example": "taken"},
            urls={"quick-otter.*": "https://quick-otter.dev.example:8443"},
            names={"quick-otter.*": "quick-otter.dev.example"},
        ),
        b'{"type":"ack","ok":true,"features":["urls","names","partial"],'
        b'"denied":{"b.example":"taken"},'
        b'"urls":{"quick-otter.*":"https://quick-otter.dev.example:8443"},'
        b'"names":{"quick-otter.*":"quick-otter.dev.example"}}\n',
    ),
    (Ping(1700000000123), b'{"type":"ping","ts":1700000000123}\n'),
    (Pong(0), b'{"type":"pong","ts":0}\n'),
]


def exactly(message):
    """A message with its kind: to Python it is only a tuple."""
    return type(message), tuple(message)


@pytest.mark.parametrize(("message", "data"), WIRE)
def test_messages_both_ways(message, data):
    assert encode_message(message) == data
    assert exactly(decode_message(data)) == exactly(message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"type":"register","auth_token":"old"}', Register("old", {}, {})),
        (b'{"type":"register","token":"new","auth_token":"old"}', Register("new", {}, {})),
        (b'{"type":"register","routes":null,"modes":null,"features":null}', Register("", {}, {})),
        (b'{"type":"register","host_headers":null}', Register("", {}, {})),
        (b'{"type":"register","token":null,"auth_token":"x"}', Register("x", {}, {})),
        (b'{"type":"ack","ok":true,"error":null,"unknown":[1]}', Ack(True)),
        (b' {"ok" : false , "type":"ack"}\r\n', Ack(False)),
        (b'{"type":"ping"}', Ping(0)),
        (b'{"type":"pong","ts":1.5e3}', Pong(1500)),
        (b'{"type":"register","token":"\\u00e4\xc3\xb6"}', Register("\u00e4\u00f6", {}, {})),
    ],
)
def test_what_other_programs_may_leave_out_or_add(data, message):
    assert exactly(decode_message(data)) == exactly(message)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "a control message that is not JSON in UTF-8"),
        (b"{", "a control message that is not JSON in UTF-8"),
        (b'{"type":"ping",}', "a control message that is not JSON in UTF-8"),
        (b'{"type":"ping"} {}', "a control message that is not JSON in UTF-8"),
        (b'{"type":"\xff"}', "a control message that is not JSON in UTF-8"),
        (b"[" * 60_000 + b"]" * 60_000, "a control message that is not JSON in UTF-8"),
        (b'["ping"]', "a control message that is not a JSON object"),
        (b'"ping"', "a control message that is not a JSON object"),
        (b"null", "a control message that is not a JSON object"),
        (b"{}", 'a control message whose "type" is not a text'),
        (b'{"type":["ping"]}', 'a control message whose "type" is not a text'),
        (b'{"type":"ack"}', 'an "ack" whose "ok" is neither true nor false'),
        (b'{"type":"ack","ok":1}', 'an "ack" whose "ok" is neither true nor false'),
        (b'{"type":"ack","ok":false,"error":5}', '"error" is not a text'),
        (b'{"type":"ping","ts":"now"}', 'a "ping" whose "ts" is not a number of milliseconds'),
        (b'{"type":"pong","ts":null}', 'a "pong" whose "ts" is not a number of milliseconds'),
        (b'{"type":"register","token":7}', '"token" is not a text'),
        (b'{"type":"register","token":"","auth_token":{}}', '"auth_token" is not a text'),
        (b'{"type":"register","routes":["a"]}', '"routes" is not an object'),
        (b'{"type":"register","routes":{"a":1}}', '"routes" does not map texts to texts'),
        (b'{"type":"register","modes":{"a":null}}', '"modes" does not map texts to texts'),
        (b'{"type":"register","features":{"a":"b"}}', '"features" is not a list of texts'),
        (b'{"type":"register","features":[1]}', '"features" is not a list of texts'),
        (b'{"type":"register","host_headers":["a"]}', '"host_headers" is not an object'),
        (b'{"type":"register","protocols":["a"]}', '"protocols" is not an object'),
        (b'{"type":"ack","ok":true,"urls":["a"]}', '"urls" is not an object'),
        (b'{"type":"ack","ok":true,"names":{"a.*":1}}', '"names" does not map texts to texts'),
        (b'{"type":"ack","ok":true,"denied":{"a":[]}}', '"denied" does not map texts to texts'),
        (b'{"type":"port","url":5}', '"url" is not a text'),
    ],
)
def test_reject_messages(data, sentence):
    with pytest.raises(ProtocolError) as caught:
        decode_message(data)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_reject_times_that_json_does_not_have(number):
    # Sent on in a pong, such a number would be something that no JSON reader takes.
    with pytest.raises(ProtocolError):
        decode_message(b'{"type":"ping","ts":%s}' % number.encode())


@pytest.mark.parametrize(
    "data",
    [
        b'{"type":"register","token":"\\ud800"}',
        b'{"type":"register","routes":{"\\udfff":"a"}}',
        b'{"type":"register","token":"\xed\xa0\x80"}',
        '{"type":"ping","ts":1}'.encode("utf-16-le"),
    ],
    ids=["escaped", "in a key", "encoded", "utf-16"],
)
def test_reject_text_that_is_not_utf8(data):
    # It would come out as a UnicodeEncodeError, wherever it is hashed, compared or logged later.
    with pytest.raises(ProtocolError):
        decode_message(data)


# Cutting a control stream ------------------------------------------------------------------------

STREAM = [
    (b'{"type":"ping","ts":1}\n', Ping(1)),
    (b' \r\n\t{"type":"pong","ts":2}', Pong(2)),
    (b'{"type":"ack","ok":false,"error":"a } \\" { \\\\"}', Ack(False, 'a } " { \\')),
    (b'\n{"type":"register","token":"\\\\\\"","routes":{"{":"}"},"modes":{"a":"}}"}}\n',
     Register('\\"', {"{": "}"}, {"a": "}}"})),
    (b'{"x":{"y":[{"z":"\\u007d"}]},"type":"ping","ts":3}\n\n', Ping(3)),
]  # fmt: skip
STREAM_BYTES = b"".join(data for data, _ in STREAM)
STREAM_MESSAGES = [exactly(message) for _, message in STREAM]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 64, 1000])
def test_reader_finds_messages_in_any_pieces(size):
    reader, messages = MessageReader(), []
    for at in range(0, len(STREAM_BYTES), size):
        messages += reader.feed(STREAM_BYTES[at : at + size])
    assert [exactly(message) for message in messages] == STREAM_MESSAGES


def test_reader_gives_each_message_as_soon_as_it_is_whole():
    reader = MessageReader()
    data = b'{"type":"ping","ts":12}'
    assert reader.feed(data[:-1]) == []
    assert reader.feed(data[-1:]) == [Ping(12)]
    assert reader.feed(b"\n") == []
    assert reader.feed(b"") == []


@pytest.mark.parametrize("data", [b"x", b"[1]", b"1", b'"a"', b'{"type":"ping"}x', b" }", b"\0{}"])
def test_reader_refuses_what_cannot_become_an_object_at_once(data):
    with pytest.raises(ProtocolError, match="^a control message that is not a JSON object$"):
        MessageReader().feed(data)


def sized(size):
    """A ping of ``size`` bytes."""
    start, end = b'{"type":"ping","x":"', b'"}'
    return start + b"x" * (size - len(start) - len(end)) + end


def test_reader_takes_a_message_of_the_limit():
    assert MESSAGE_LIMIT == 65536
    assert MessageReader().feed(sized(MESSAGE_LIMIT)) == [Ping(0)]
    assert MessageReader().feed(b"\n" * MESSAGE_LIMIT + sized(MESSAGE_LIMIT) * 3) == [Ping(0)] * 3


@pytest.mark.parametrize("pieces", [1, 2, 1000])
def test_reader_refuses_a_message_above_the_limit(pieces):
    data, reader = sized(MESSAGE_LIMIT + 1), MessageReader()
    size = len(data) // pieces
    with pytest.raises(ProtocolError, match="^a control message of more than 65536 bytes, "):
        for at in range(0, len(data), size):
            reader.feed(data[at : at + size])


def test_reader_refuses_a_message_that_never_ends_before_it_has_all_of_it():
    reader = MessageReader()
    reader.feed(b'{"x":"' + b"x" * (MESSAGE_LIMIT - 6))
    with pytest.raises(ProtocolError, match="more than 65536 bytes"):
        reader.feed(b"x")


def test_a_message_of_an_unknown_type_is_one():
    assert decode_message(b'{"type":"hello","to":["you"]}') == "hello"


def test_reader_passes_over_unknown_messages_and_tells_each_kind_once():
    told = []
    reader = MessageReader(told.append)
    data = b'{"type":"hello"}{"type":"ping","ts":1}\n{"type":"bye"}\n{"type":"hello"}'
    assert reader.feed(data + b'{"type":"pong","ts":2}') == [Ping(1), Pong(2)]
    assert told == ["hello", "bye"]


def unknown(size, kind="hello"):
    return b'{"type":"%s"' % kind.encode() + b" " * (size - len(kind) - 11) + b"}"


@pytest.mark.parametrize("size", [UNKNOWN_LEAST // 4, UNKNOWN_LEAST, MESSAGE_LIMIT])
def test_reader_ends_a_flood_of_unknown_messages(size):
    reader, fit = MessageReader(), UNKNOWN_LIMIT // max(size, UNKNOWN_LEAST)
    for _ in range(3):  # a known one begins a new row
        assert reader.feed(unknown(size) * fit) == []
        assert reader.feed(b'{"type":"ping","ts":1}') == [Ping(1)]
    reader.feed(unknown(size) * fit)
    with pytest.raises(ProtocolError, match="bytes of unknown control messages"):
        reader.feed(unknown(size))


def test_reader_remembers_few_unknown_kinds():
    told = []
    reader = MessageReader(told.append)
    for number in range(10 * UNKNOWN_KINDS):
        reader.feed(unknown(50, f"kind{number}"))
    assert len(told) == len(reader._unknown) == UNKNOWN_KINDS


@pytest.mark.parametrize("seed", range(10))
def test_whatever_comes_the_reader_raises_protocol_error_or_nothing(seed):
    rng = random.Random(seed)
    for _ in range(300):
        data = bytearray(STREAM_BYTES)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            piece = rng.choice((b"", b'"', b"{", b"}", b"\\", b"\xff", b"0"))
            data[at : at + rng.randrange(3)] = piece
        reader = MessageReader()
        try:
            while data:
                size = rng.randrange(1, 60)
                for message in reader.feed(bytes(data[:size])):
                    json.loads(encode_message(message))
                del data[:size]
        except ProtocolError:
            pass


# The data header ---------------------------------------------------------------------------------


def reader_of(data):
    """A read_exactly() over bytes."""

    def read_exactly(count):
        nonlocal data
        assert len(data) >= count, "it reads more than there is"
        piece, data = data[:count], data[count:]
        return piece

    return read_exactly


HEADERS = [
    ("app.example.com", "01 000f 6170702e6578616d706c652e636f6d"),
    ("A.b:8443", "01 0008 412e623a38343433"),
    ("", "01 0000"),
    ("b\u00fccher.example", "01 000f 62c3bc636865722e6578616d706c65"),
    ("x" * 300, "01 012c" + "78" * 300),
]


@pytest.mark.parametrize(("hostname", "text"), HEADERS)
def test_data_header_both_ways(hostname, text):
    assert encode_data_header(hostname) == bytes.fromhex(text)
    assert read_data_header(reader_of(bytes.fromhex(text) + b"GET /")) == (hostname, None, False)


@pytest.mark.parametrize("visitor", ["192.0.2.1", "2001:db8::1"])
def test_data_header_with_the_visitors_address_both_ways(visitor):
    ends = Ends((visitor, 40000), ("198.51.100.7", 443))
    data = encode_data_header("a.b", ends)
    assert data[0] == 2
    assert read_data_header(reader_of(data + b"rest")) == ("a.b", ends, False)


@pytest.mark.parametrize("ends", [None, Ends(("192.0.2.1", 40000), ("198.51.100.7", 443))])
def test_data_header_of_a_relayed_stream_both_ways(ends):
    data = encode_data_header("a.b", ends, relayed=True)
    assert data[0] == 3
    assert read_data_header(reader_of(data + b"rest")) == ("a.b", ends, True)


def test_data_header_leaves_what_follows():
    read_exactly = reader_of(encode_data_header("a.b") + b"rest")
    assert read_data_header(read_exactly) == ("a.b", None, False)
    assert read_exactly(4) == b"rest"


NOT_TWO = "a data header that does not hold two addresses"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("00 0001 61", "data header version 0, expected 1 to 3"),
        ("04 0001 61", "data header version 4, expected 1 to 3"),
        ("47 4554 20", "data header version 71, expected 1 to 3"),
        ("02 0001 61", NOT_TWO),
        (f"03 0015 {b'a.b 1.2.3.4 5 1.2.3.4'.hex()}", NOT_TWO),
        (f"02 0015 {b'a.b 1.2.3.4 5 1.2.3.4'.hex()}", NOT_TWO),
        (f"02 0017 {b'a.b 1.2.3.4 5 1.2.3.4 x'.hex()}", NOT_TWO),
        (f"02 001b {b'a.b 1.2.3.4 5 1.2.3.4 65536'.hex()}", NOT_TWO),
        (f"02 0017 {b'a.b 1.2.3.4 5 1.2.3 1234'[:23].hex()}", NOT_TWO),
        ("02 0002 c328", "a data header whose hostname is not UTF-8"),
        ("01 0002 c328", "a data header whose hostname is not UTF-8"),
    ],
)
def test_reject_data_headers(text, sentence):
    with pytest.raises(ProtocolError) as caught:
        read_data_header(reader_of(bytes.fromhex(text)))
    assert str(caught.value) == sentence


# Hostnames ---------------------------------------------------------------------------------------

LABEL = "a" * 63
