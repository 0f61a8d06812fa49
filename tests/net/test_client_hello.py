"""client_hello.py by bytes: hellos of a TLS library, and hand-made ones that break one rule."""

import random
import ssl

import pytest

from gotunnel_server.net import client_hello
from gotunnel_server.net.client_hello import Hello, NotTLS


def real_hello(server_name=None, alpn=(), newest=None):
    """The bytes that Python's own TLS library sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if newest:
        context.maximum_version = newest
    if alpn:
        context.set_alpn_protocols(list(alpn))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def vector(width, content):
    return len(content).to_bytes(width, "big") + content


def extension(kind, content):
    return kind.to_bytes(2, "big") + vector(2, content)


def sni(*names, kind=0):
    return extension(0, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names)))


def alpn(*names):
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


def body(extensions=None, session_id=b"", ciphers=b"\x13\x01", compressions=b"\x00"):
    """A ClientHello; ``extensions`` of None leaves the block out."""
    return (
        b"\x03\x03"
        + bytes(32)
        + vector(1, session_id)
        + vector(2, ciphers)
        + vector(1, compressions)
        + (b"" if extensions is None else vector(2, extensions))
    )


def message(content):
    return b"\x01" + vector(3, content)


def parse(data):
    return client_hello.Reader().parse(data)


def records(joined, size=16384):
    return b"".join(
        b"\x16\x03\x01" + vector(2, joined[at : at + size]) for at in range(0, len(joined), size)
    )


def hello_with(extensions):
    return records(message(body(extensions)))


REAL = {
    "name": (real_hello("app.example.com"), Hello("app.example.com", ())),
    "no name": (real_hello(None), Hello(None, ())),
    "name and alpn": (
        real_hello("App.Example.com", ["h2", "http/1.1"]),
        Hello("app.example.com", ("h2", "http/1.1")),
    ),
    "challenge": (
        real_hello("app.example.com", ["acme-tls/1"]),
        Hello("app.example.com", ("acme-tls/1",)),
    ),
    "tls 1.2 only": (
        real_hello("app.example.com", newest=ssl.TLSVersion.TLSv1_2),
        Hello("app.example.com", ()),
    ),
    "address": (real_hello("192.0.2.1"), Hello(None, ())),
}

LONGEST_NAME = "a." * 126 + "a"

GOOD = REAL | {
    "no extension block": (records(message(body())), Hello(None, ())),
    "no extension": (hello_with(b""), Hello(None, ())),
    "short name": (hello_with(sni(b"a")), Hello("a", ())),
    "longest name": (hello_with(sni(LONGEST_NAME.encode())), Hello(LONGEST_NAME, ())),
    "case and dot": (hello_with(sni(b"APP.example.com.")), Hello("app.example.com", ())),
    "underscore, hyphens": (
        hello_with(sni(b"_x.xn--bcher-kva.example")),
        Hello("_x.xn--bcher-kva.example", ()),
    ),
    "ipv4": (hello_with(sni(b"192.0.2.1")), Hello(None, ())),
    "ipv6": (hello_with(sni(b"2001:db8::1")), Hello(None, ())),
    "other name type": (hello_with(sni(b"what", kind=7)), Hello(None, ())),
    "any protocol bytes": (
        hello_with(alpn(b"\x0a\x0a", b"\xff", b"http/1.1")),
        Hello(None, ("\n\n", "\xff", "http/1.1")),
    ),
    "unknown extension": (
        hello_with(extension(0x1A1A, b"") + sni(b"a") + alpn(b"h2")),
        Hello("a", ("h2",)),
    ),
    "small records": (records(message(body(sni(b"a"))), size=3), Hello("a", ())),
    "bytes behind it": (hello_with(sni(b"a")) + b"\x17\x03\x03 whatever", Hello("a", ())),
}


@pytest.mark.parametrize("data, expected", GOOD.values(), ids=GOOD)
def test_hello_is_read(data, expected):
    assert parse(data) == expected


@pytest.mark.parametrize("data, expected", GOOD.values(), ids=GOOD)
def test_hello_is_read_one_byte_at_a_time(data, expected):
    reader = client_hello.Reader()
    answers = [reader.parse(data[:end]) for end in range(len(data) + 1)]
    assert answers == [parse(data[:end]) for end in range(len(data) + 1)]
    first = answers.index(expected)
    assert answers[:first] == [None] * first
    assert set(answers[first:]) == {expected}


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("data, expected", REAL.values(), ids=REAL)
def test_hello_split_over_records_is_joined(data, expected, size):
    split, reader = records(data[5:], size), client_hello.Reader()
    assert parse(split) == expected
    assert reader.parse(split[:-1]) is None
    assert reader.parse(split) == expected


NOT_HELLOS = {
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", "record type 83"),
    "http": (b"GET / HTTP/1.1\r\n\r\n", "record type 71"),
    "sslv2": (b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10", "record type 128"),
    "alert": (b"\x15\x03\x01\x00\x02\x01\x00", "record type 21"),
    "version": (b"\x16\x02", "record version 2"),
    "empty record": (b"\x16\x03\x01\x00\x00", "record of 0 bytes"),
    "later empty record": (records(b"\x01") + b"\x16\x03\x01\x00\x00", "record of 0 bytes"),
    "long record": (b"\x16\x03\x01\x40\x01", "record of 16385 bytes"),
    "server hello": (b"\x16\x03\x03\x00\x04\x02", "handshake type 2"),
    "second record of another type": (
        records(message(body()), size=9)[:14] + b"\x17",
        "record type 23",
    ),
    "too long": (b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfd", "hello of 16385 bytes"),
    "empty": (records(message(b"")), "session id"),
    "cut in random": (records(message(body()[:20])), "session id"),
    "cut before session id": (records(message(body()[:34])), "session id"),
    "long session id": (records(message(body(session_id=bytes(33)))), "session id of 33"),
    "no ciphers": (records(message(body(ciphers=b""))), "cipher suites of 0"),
    "odd ciphers": (records(message(body(ciphers=b"\x13\x01\x13"))), "cipher suites of 3"),
    "no compression": (records(message(body(compressions=b""))), "no compression"),
    "cut in compression": (records(message(body()[:-1])), "compression methods up to"),
    "cut in extensions": (records(message(body(sni(b"a"))[:-1])), "extensions up to"),
    "half a length": (records(message(body() + b"\x00")), "extensions up to"),
    "after extensions": (records(message(body(b"") + b"\x00")), "1 bytes after the extensions"),
    "extension too long": (hello_with(b"\x00\x00\x00\x09"), "extension up to"),
    "extension cut": (hello_with(b"\x00"), "extension up to"),
    "sni twice": (hello_with(sni(b"a") + sni(b"b")), "extension 0 twice"),
    "alpn twice": (hello_with(alpn(b"a") + alpn(b"b")), "extension 16 twice"),
    "unknown twice": (hello_with(extension(99, b"") * 2), "extension 99 twice"),
    "sni without list": (hello_with(extension(0, b"")), "server names up to"),
    "sni of empty list": (hello_with(sni()), "no server name"),
    "sni list too short": (hello_with(extension(0, b"\x00\x01\x00\x00\x01a")), "bytes after"),
    "sni name too long": (hello_with(extension(0, b"\x00\x04\x00\x00\x09a")), "server name up to"),
    "two hostnames": (hello_with(sni(b"a", b"b")), "of type 0 twice"),
    "empty hostname": (hello_with(sni(b"")), "expected an ASCII hostname"),
    "only a dot": (hello_with(sni(b".")), "expected an ASCII hostname"),
    "empty label": (hello_with(sni(b"a..b")), "expected an ASCII hostname"),
    "nul": (hello_with(sni(b"a\x00.example.com")), "expected an ASCII hostname"),
    "line end": (hello_with(sni(b"a\n")), "expected an ASCII hostname"),
    "non-ascii": (hello_with(sni("bücher.example".encode())), "expected an ASCII hostname"),
    "port": (hello_with(sni(b"a:443")), "expected an ASCII hostname"),
    "long hostname": (hello_with(sni(b"a." * 126 + b"aa")), "server name of 254 bytes"),
    "alpn of empty list": (hello_with(alpn()), "no protocol"),
    "empty protocol": (hello_with(alpn(b"")), "empty protocol"),
    "alpn list too long": (hello_with(extension(16, b"\x00\x09\x02h2")), "protocols up to"),
    "protocol too long": (hello_with(extension(16, b"\x00\x03\x09h2")), "protocol up to"),
}


@pytest.mark.parametrize("data, sentence", NOT_HELLOS.values(), ids=NOT_HELLOS)
def test_reject_what_is_no_hello(data, sentence):
    with pytest.raises(NotTLS, match=sentence):
        parse(data)


@pytest.mark.parametrize("data, sentence", NOT_HELLOS.values(), ids=NOT_HELLOS)
def test_reject_at_the_last_byte_of_proof(data, sentence):
    """Byte by byte: None at first, then NotTLS, and never again anything else."""
    verdicts = []
    for end in range(len(data) + 1):
        try:
            verdicts.append(parse(data[:end]))
        except NotTLS:
            verdicts.append(NotTLS)
    first = verdicts.index(NotTLS)
    assert verdicts == [None] * first + [NotTLS] * (len(data) + 1 - first)


def test_nothing_yet_is_incomplete():
    assert parse(b"") is None


def test_one_byte_tells_what_is_not_tls():
    with pytest.raises(NotTLS):
        parse(b"S")


def test_longest_hello_is_accepted_and_a_longer_one_is_not():
    def padded(size):
        spare = size - len(hello_with(extension(21, b"")))
        return hello_with(extension(21, bytes(spare)))

    assert parse(padded(client_hello.HELLO_LIMIT)) == Hello(None, ())
    assert parse(padded(client_hello.HELLO_LIMIT)[:-1]) is None
    longer = padded(client_hello.HELLO_LIMIT + 1)
    with pytest.raises(NotTLS, match="no end of the hello"):
        parse(longer)
    with pytest.raises(NotTLS, match="no end of the hello"):
        parse(longer[: client_hello.HELLO_LIMIT])


def test_any_bytes_give_a_value_or_not_tls():
    chance = random.Random(8446)
    seeds = [data for data, _ in GOOD.values()]
    outcomes = {Hello: 0, NotTLS: 0, type(None): 0}
    for _ in range(5000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            choice = chance.randrange(4)
            if choice == 0:
                data[at] = chance.randrange(256)
            elif choice == 1:
                data[at] ^= 1 << chance.randrange(8)
            elif choice == 2:
                del data[at : at + chance.randint(1, 4)]
                data = data or bytearray(b"\x16")
            else:
                data[at:at] = chance.randbytes(chance.randint(1, 4))
        try:
            outcome = type(parse(bytes(data)))
        except NotTLS:
            outcome = NotTLS
        outcomes[outcome] += 1
    assert all(outcomes.values())


@pytest.mark.parametrize(
    ("offered", "own"),
    [
        ((), None), (("http/1.1",), None), (("h2", "http/1.1"), None), (("h2",), "h2"),
        (("imap", "postgresql"), None), (("grpc-exp", "h2"), "grpc-exp"),
        (("\x8a\x8a", "h2"), None),
        (("a b",), None), (("x" * 255,), "x" * 255),
    ],
)  # fmt: skip
def test_protocol_of_a_hostname_in_tcp_mode_is_the_visitors_first_unless_it_offers_http(
    offered, own
):
    assert client_hello.own_protocol(offered) == own
