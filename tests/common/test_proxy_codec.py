"""Both ends of the PROXY protocol by bytes: headers as its specification shows them, headers that
break one rule, our agent's read by our gateway and by nginx."""

import ipaddress
import random
import socket

import pytest
from proxy_reader import SIGNATURE, reader  # noqa: F401, a fixture
from support import Wire

from gotunnel_agent.common.proxy_protocol import (
    LINE_LIMIT,
    VERSIONS,
    NotProxy,
    Source,
    begins,
    encode,
    encode_unknown,
    may_begin,
    parse,
)

REQUEST = b"GET / HTTP/1.1\r\nHost: 192.168.0.11\r\n\r\n"
HIGHEST = ":".join(["ffff"] * 8)  # the longest address


def line(text):
    return text.encode("latin-1") + b"\r\n"


def binary(start, block=b"", length=None):
    """A header of version 2; ``start`` are the 13th and 14th byte in hex."""
    length = len(block) if length is None else length
    return SIGNATURE + bytes.fromhex(start) + length.to_bytes(2, "big") + block


def tlv(kind, value):
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


INET = bytes([192, 168, 0, 1]) + bytes([192, 168, 0, 11]) + bytes.fromhex("dc0401bb")
INET6 = bytes.fromhex(f"20010db8{'00' * 11}0120010db8{'00' * 11}02dc0401bb")
MAPPED = bytes.fromhex(f"{'00' * 10}ffffc0000201{'00' * 10}ffffc0000202dc0401bb")
UNIX = b"/run/a.sock".ljust(108, b"\0") + b"/run/b.sock".ljust(108, b"\0")
# What balancers append: ALPN, authority, CRC32c, padding, unique id, TLS, namespace, their own.
TLVS = (
    tlv(0x01, b"h2") + tlv(0x02, b"app.example.com") + tlv(0x03, b"\0\0\0\0") + tlv(0x04, b"")
    + tlv(0x05, bytes(128)) + tlv(0x20, b"\x01\0\0\0\0" + tlv(0x21, b"TLSv1.3"))
    + tlv(0x30, b"blue") + tlv(0xEA, b"\x01vpce-08d2bf15fac5001c9")
)  # fmt: skip

SPECIFIED = Source("192.168.0.1", 56324)
GOOD = {
    "v1 as specified": (line("PROXY TCP4 192.168.0.1 192.168.0.11 56324 443"), SPECIFIED),
    "v1 longest IPv4": (
        line("PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535"),
        Source("255.255.255.255", 65535),
    ),
    "v1 longest IPv6": (
        line(f"PROXY TCP6 {HIGHEST} {HIGHEST} 65535 65535"), Source(HIGHEST, 65535),
    ),
    "v1 IPv6": (line("PROXY TCP6 2001:DB8::1 ::1 0 443"), Source("2001:db8::1", 0)),
    "v1 mapped": (line("PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2"), Source("192.0.2.1", 1)),
    "v1 mapped in hex": (line("PROXY TCP6 ::ffff:c000:201 ::1 1 2"), Source("192.0.2.1", 1)),
    "v1 unknown": (line("PROXY UNKNOWN"), None),
    "v1 unknown, longest": (line(f"PROXY UNKNOWN {HIGHEST} {HIGHEST} 65535 65535"), None),
    "v1 unknown, anything": (line("PROXY UNKNOWN  \xff \0 \n \r x "), None),
    "v2 IPv4": (binary("21 11", INET), SPECIFIED),
    "v2 IPv6": (binary("21 21", INET6), Source("2001:db8::1", 56324)),
    "v2 mapped": (binary("21 21", MAPPED), Source("192.0.2.1", 56324)),
    "v2 with TLVs": (binary("21 11", INET + TLVS), SPECIFIED),
    "v2 as long as may be": (binary("21 11", INET + bytes(2048 - 16 - 12)), SPECIFIED),
    "v2 unix": (binary("21 31", UNIX), None),
    "v2 local": (binary("20 00"), None),
    "v2 local with addresses": (binary("20 11", INET), None),
    "v2 local of any family": (binary("20 ff", b"abc"), None),
    "v2 unspecified": (binary("21 00"), None),
    "v2 unspecified with TLVs": (binary("21 00", TLVS), None),
    "v2 unspecified transport": (binary("21 10", b"any"), None),
    "v2 unspecified family": (binary("21 01", b"any"), None),
}  # fmt: skip

BAD = {
    "http": (REQUEST, "expected a header of the PROXY protocol"),
    "TLS": (b"\x16\x03\x01\x02\0", "expected a header"),
    "ssh": (b"SSH-2.0-a\r\n", "expected a header"),
    "v1 small letters": (b"proxy ", "expected a header"),
    "v1 tab": (b"PROXY\tTCP4", "expected a header"),
    "v1 another family": (line("PROXY UDP4 1.2.3.4 1.2.3.4 1 2"), "family 'UDP4'"),
    "v1 no family": (line("PROXY "), "family ''"),
    "v1 family in small letters": (line("PROXY tcp4 1.2.3.4 1.2.3.4 1 2"), "family 'tcp4'"),
    "v1 unknown and more": (line("PROXY UNKNOWNS"), "family 'UNKNOWNS'"),
    "v1 unknown by LF alone": (line("PROXY UNKNOWN\nGET /"), "family 'UNKNOWN\\nGET'"),
    "v1 two spaces": (line("PROXY TCP4  1.2.3.4 1.2.3.4 1 2"), "5 words behind TCP4"),
    "v1 space at the end": (line("PROXY TCP4 1.2.3.4 1.2.3.4 1 2 "), "5 words"),
    "v1 nothing but a family": (line("PROXY TCP4"), "0 words"),
    "v1 no ports": (line("PROXY TCP4 1.2.3.4 1.2.3.4"), "2 words"),
    "v1 IPv6 in IPv4's place": (line("PROXY TCP4 ::1 1.2.3.4 1 2"), "'::1'"),
    "v1 IPv4 in IPv6's place": (line("PROXY TCP6 ::1 1.2.3.4 1 2"), "'1.2.3.4'"),
    "v1 octal": (line("PROXY TCP4 01.2.3.4 1.2.3.4 1 2"), "'01.2.3.4'"),
    "v1 short address": (line("PROXY TCP4 127.1 1.2.3.4 1 2"), "an address of TCP4"),
    "v1 number as address": (line("PROXY TCP4 1234567890 1.2.3.4 1 2"), "an address of TCP4"),
    "v1 network": (line("PROXY TCP4 1.2.3.4/8 1.2.3.4 1 2"), "an address of TCP4"),
    "v1 zone": (line("PROXY TCP6 fe80::1%eth0 ::1 1 2"), "an address of TCP6"),
    "v1 brackets": (line("PROXY TCP6 [::1] ::1 1 2"), "an address of TCP6"),
    "v1 bad destination": (line("PROXY TCP4 1.2.3.4 1.2.3 1 2"), "'1.2.3' in"),
    "v1 port with a zero ahead": (line("PROXY TCP4 1.2.3.4 1.2.3.4 01 2"), "'01'"),
    "v1 port too high": (line("PROXY TCP4 1.2.3.4 1.2.3.4 1 65536"), "a port from 0 to 65535"),
    "v1 port negative": (line("PROXY TCP4 1.2.3.4 1.2.3.4 -1 2"), "'-1'"),
    "v1 port with a plus": (line("PROXY TCP4 1.2.3.4 1.2.3.4 +1 2"), "'+1'"),
    "v1 port of other digits": (line("PROXY TCP4 1.2.3.4 1.2.3.4 \xb2 2"), "a port"),
    "v1 LF within": (line("PROXY TCP4 1.2.3.4 1.2.3.4 1 2\nGET /"), "5 words"),
    "v1 CR within": (line("PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r"), "'2\\r'"),
    "v1 without end": (b"PROXY UNKNOWN " + bytes(107 - 14), "no CRLF in the first 107 bytes"),
    "v1 CRLF too late": (line("PROXY UNKNOWN " + "x" * (106 - 14)), "no CRLF in the first 107"),
    "v2 signature cut": (SIGNATURE[:11] + b"\r", "expected a header"),
    "v2 version 1": (binary("11 11", INET), "version 1 behind the PROXY signature, expected 2"),
    "v2 version 3": (binary("31 11", INET), "version 3"),
    "v2 command 2": (binary("22 11", INET), "PROXY command 2, expected LOCAL (0) or PROXY (1)"),
    "v2 family 4": (binary("21 41", INET), "PROXY address family 4, expected 0 to 3"),
    "v2 transport 3": (binary("21 13", INET), "PROXY transport 3, expected a stream (1)"),
    "v2 datagrams": (binary("21 12", INET), "PROXY transport 2"),
    "v2 unix datagrams": (binary("21 32", UNIX), "PROXY transport 2"),
    "v2 IPv4 too short": (binary("21 11", INET[:-1]), "11 bytes of PROXY addresses, expected at"),
    "v2 IPv6 too short": (binary("21 21", INET6[:-1]), "expected at least 36"),
    "v2 unix too short": (binary("21 31", UNIX[:-1]), "expected at least 216"),
    "v2 too long": (binary("21 11", INET, 2033), "2049 bytes, expected at most 2048"),
    "v2 local too long": (binary("20 00", b"", 65535), "expected at most 2048"),
}


def verdict(data):
    """What parse() says of the bytes; a NotProxy as its text."""
    try:
        return parse(data)
    except NotProxy as error:
        return str(error)


def verdict_byte_by_byte(data):
    """The first verdict, and how many bytes it took."""
    for count in range(len(data) + 1):
        if (said := verdict(data[:count])) is not None:
            return said, count
    return None, len(data)


# The gateway reads -------------------------------------------------------------------------------


@pytest.mark.parametrize(("header", "source"), GOOD.values(), ids=GOOD)
def test_header_is_read_whatever_follows(header, source):
    for rest in (b"", REQUEST, b"\r\n", header):
        assert parse(header + rest) == (len(header), source)
    assert begins(header)


@pytest.mark.parametrize(("header", "source"), GOOD.values(), ids=GOOD)
def test_header_that_is_not_whole_has_to_grow(header, source):
    assert verdict_byte_by_byte(header + REQUEST) == ((len(header), source), len(header))
    assert all(may_begin(header[:count]) for count in range(len(header)))


@pytest.mark.parametrize(("data", "problem"), BAD.values(), ids=BAD)
def test_broken_header_is_refused_however_it_is_cut(data, problem):
    with pytest.raises(NotProxy) as refused:
        parse(data)
    assert problem in str(refused.value)
    said, count = verdict_byte_by_byte(data)
    assert isinstance(said, str)
    for longer in (data[:count] + REQUEST, data + REQUEST):
        assert isinstance(verdict(longer), str)


def test_broken_binary_header_is_refused_at_the_byte_that_breaks_it():
    for name, count in {"v2 version 1": 13, "v2 family 4": 14, "v2 too long": 16}.items():
        data, problem = BAD[name]
        said, took = verdict_byte_by_byte(data)
        assert problem in said and took == count


def test_endless_line_is_refused_at_the_limit():
    said, took = verdict_byte_by_byte(b"PROXY " + b"x" * 10_000)
    assert "no CRLF" in said and took == LINE_LIMIT


@pytest.mark.parametrize("start", [b"PROXY ", SIGNATURE], ids=["v1", "v2"])
def test_start_of_a_header_is_known_once_it_is_whole(start):
    for count in range(len(start)):
        assert may_begin(start[:count]) and not begins(start[:count])
        assert parse(start[:count]) is None
        wrong = start[:count] + bytes([start[count] ^ 1])
        assert not may_begin(wrong) and not begins(wrong)
        assert not may_begin(wrong + start) and not begins(wrong + start)
    for data in (start, start + b"anything"):
        assert may_begin(data) and begins(data)


@pytest.mark.parametrize("data", [b"\x16\x03\x01", b"SSH-2.0", b"GET / ", b"POST /", b"\0\0\0\x08"])
def test_other_protocols_do_not_begin_as_a_header(data):
    assert not may_begin(data) and not begins(data)
    with pytest.raises(NotProxy):
        parse(data)


def test_any_bytes_are_read_or_refused_the_same_in_pieces():
    rng = random.Random(6)
    whole = [data for data, _ in [*GOOD.values(), *BAD.values()]]
    verdicts = {tuple: 0, str: 0, type(None): 0}
    for _ in range(6000):
        data = mutated(rng, rng.choice(whole))[:300]
        said, count = same_verdict(data)
        verdicts[type(said)] += 1
        if type(said) is tuple:
            length, source = said
            assert length == count
            assert source is None or str(ipaddress.ip_address(source.address)) == source.address
    assert min(verdicts.values()) > 200  # each kind of verdict came often enough


def test_random_bytes_behind_a_start_are_read_or_refused():
    rng = random.Random(7)
    for _ in range(6000):
        start = rng.choice([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", SIGNATURE])
        same_verdict(start + rng.randbytes(rng.randrange(120)) + rng.choice([b"", b"\r\n"]))


def same_verdict(data):
    """The verdict byte by byte, which must equal that of all bytes at once; but the texts of
    refusals may show a different number of bytes."""
    said, count = verdict_byte_by_byte(data)
    at_once = verdict(data)
    assert at_once == said or isinstance(at_once, str) and isinstance(said, str)
    return said, count


def mutated(rng, data):
    data = bytearray(data[: rng.choice([len(data), rng.randrange(1, len(data) + 1)])])
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(data))
        change = rng.randrange(3)
        if change == 0:
            data[at] = rng.choice([rng.randrange(256), *b"0 :.%\r\n"])
        elif change == 1:
            data[at:at] = rng.choice([b" ", b"0", b"\r\n", rng.randbytes(3)])
        elif len(data) > 1:
            del data[at]
    return bytes(data)


# The agent writes --------------------------------------------------------------------------------


def test_agent_writes_the_line_that_the_specification_shows():
    header = encode("v1", ("192.168.0.1", 56324), ("192.168.0.11", 443))
    assert header == b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
    header = encode("v1", ("2001:db8::1", 0), ("::1", 65535))
    assert header == b"PROXY TCP6 2001:db8::1 ::1 0 65535\r\n"


def test_agent_writes_the_blocks_that_the_specification_lays_out():
    header = encode("v2", ("192.168.0.1", 56324), ("192.168.0.11", 443))
    assert header == SIGNATURE + bytes.fromhex("21 11 000c") + INET
    header = encode("v2", ("2001:db8::1", 56324), ("2001:db8::2", 443))
    assert header == SIGNATURE + bytes.fromhex("21 21 0024") + INET6


def test_agent_says_when_it_does_not_know():
    assert encode_unknown("v1") == b"PROXY UNKNOWN\r\n"
    assert encode_unknown("v2") == SIGNATURE + bytes.fromhex("20 00 0000")


def test_agent_writes_mixed_families_as_ipv6():
    assert encode("v2", ("192.0.2.1", 56324), ("2001:db8::2", 443)) == binary(
        "21 21", MAPPED[:16] + INET6[16:32] + INET6[32:]
    )
    words = encode("v1", ("2001:db8::1", 1), ("192.0.2.2", 2)).decode().split()
    assert words[:3] == ["PROXY", "TCP6", "2001:db8::1"] and words[4:] == ["1", "2"]
    assert ipaddress.IPv6Address(words[3]).ipv4_mapped == ipaddress.IPv4Address("192.0.2.2")


def test_agent_writes_mapped_addresses_as_ipv4_where_it_can():
    """A socket for both families reports IPv4 peers in that form."""
    header = encode("v1", ("::ffff:192.0.2.1", 1), ("::ffff:192.0.2.2", 2))
    assert header == b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"


def test_agent_leaves_zones_out():
    header = encode("v1", ("fe80::1%eth0\r\nEVIL", 1), ("fe80::2%1", 2))
    assert header == b"PROXY TCP6 fe80::1 fe80::2 1 2\r\n"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "source", [("localhost", 1), ("", 1), ("1.2.3.4 ", 1), ("1.2.3.4", -1), ("1.2.3.4", 65536),
               ("1.2.3.4", "1\r\n"), ("1.2.3.4", None)],
)  # fmt: skip
def test_agent_writes_no_broken_header(version, source):
    with pytest.raises(ValueError):
        encode(version, source, ("192.0.2.2", 2))
    with pytest.raises(ValueError):
        encode(version, ("192.0.2.2", 2), source)


ENDS = [
    (Source("192.0.2.1", 56324), Source("198.51.100.7", 443)),
    (Source("2001:db8::1", 1), Source("::1", 65535)),
    (Source("192.0.2.1", 1), Source("2001:db8::2", 2)),
    (Source("2001:db8::1", 1), Source("192.0.2.2", 2)),
    (Source(HIGHEST, 65535), Source(HIGHEST, 65535)),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("source", "destination"), ENDS)
def test_gateway_reads_what_the_agent_writes(version, source, destination):
    header = encode(version, source, destination)
    assert parse(header + REQUEST) == (len(header), source)


@pytest.mark.parametrize("version", VERSIONS)
def test_gateway_reads_that_the_agent_does_not_know(version):
    header = encode_unknown(version)
    assert parse(header + REQUEST) == (len(header), None)


# nginx reads -------------------------------------------------------------------------------------


def told_to_nginx(port, header):
    """The words of its answer."""
    with Wire(socket.create_connection(("127.0.0.1", port))) as wire:
        wire.send(header + b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        return wire.read_message()[1].decode().split()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("source", "destination"), ENDS)
def test_nginx_reads_what_the_agent_writes(reader, version, source, destination):
    told = told_to_nginx(reader, encode(version, source, destination))
    assert [unmapped(told[0]), int(told[1])] == [*source]
    assert [unmapped(told[2]), int(told[3])] == [*destination]


@pytest.mark.parametrize("version", VERSIONS)
def test_nginx_reads_that_the_agent_does_not_know(reader, version):
    assert told_to_nginx(reader, encode_unknown(version)) == []


def unmapped(text):
    address = ipaddress.ip_address(text)
    return str(getattr(address, "ipv4_mapped", None) or address)
