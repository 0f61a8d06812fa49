"""The PROXY protocol: a header, ahead of a visitor's bytes, that says where the visitor comes from.

A program that passes bytes on as they come cannot write X-Forwarded-For. It sends the visitor's
address in a header of its own, as HAProxy's doc/proxy-protocol.txt says, to which the sections
named here belong. Two programs of ours speak it:

    the gateway   reads the header of a trusted proxy before it (HAProxy, nginx's stream module,
                  the balancers of clouds)
    the agent     writes one to a target that is set up to expect it (nginx: ``listen ...
                  proxy_protocol``), since a target sees only its agent

There are two versions:

    1    PROXY TCP4 192.0.2.1 198.51.100.7 56324 443 CR LF
    2    signature (12), version and command (1), family and transport (1), length (2);
         then so many bytes: source, destination, source port, destination port, TLVs

All requests of a connection are the one visitor's then, so no two visitors may share it.

Bytes in, values out, and the reverse. Anybody can write such a header: whose is believed is the
caller's business.

The promise: whatever bytes come, ``parse`` returns a value or raises NotProxy. It says the same of
the same bytes, whether they come at once or one at a time. What a proxy adds as TLVs is passed
over, its CRC32c too: TCP has a checksum already, and a receiver need not know this one (§2.2.3).
"""

import ipaddress
import re
import struct
from typing import NamedTuple

from .addresses import unmapped

VERSIONS = ("v1", "v2")

# Bytes that a version 1 header takes at most, CRLF included (§2.1).
LINE_LIMIT = 107
# Bytes that we allow a version 2 header. Its addresses take 216 at most, names, ids and words on
# the visitor's TLS a few hundred more; its length field alone would have us collect 64 KiB.
HEADER_LIMIT = 2048

_LINE_START = b"PROXY "  # §2.1
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # §2.2
_STARTS = (_LINE_START, _SIGNATURE)

_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_PORT_LIMIT = 65535
_UNKNOWN = "UNKNOWN"  # version 1: the proxy knows no address
_LINE_FAMILIES = {"TCP4": ipaddress.IPv4Address, "TCP6": ipaddress.IPv6Address}

# §2.2: what stands behind the signature. Each of the two bytes holds two numbers of four bits.
_HEAD = struct.Struct("!BBH")  # version and command, family and transport, length
_PORTS = struct.Struct("!HH")  # source, destination
_VERSION = 2
_LOCAL, _PROXY = 0, 1
_UNSPEC, _INET, _INET6, _UNIX = 0, 1, 2, 3
_STREAM = 1
_FIXED = len(_SIGNATURE) + _HEAD.size  # bytes before the addresses
_INET_SIZES = {_INET: 4, _INET6: 16}  # bytes of an address
_UNIX_SIZE = 108  # bytes of a path

# TCP over each family of addresses, as version 1 and as version 2 write it; by ipaddress's number.
_FAMILIES = {4: ("TCP4", _INET), 6: ("TCP6", _INET6)}


class Source(NamedTuple):
    """Where a visitor comes from, as the proxy has seen it.

    An IPv4 address that came as an IPv4-mapped IPv6 address (::ffff:192.0.2.1) is written as IPv4.
    """

    address: str
    port: int


class NotProxy(Exception):
    """These bytes are no header of the PROXY protocol, or one that breaks the rules."""


# Writing -----------------------------------------------------------------------------------------


def encode(version: str, source: tuple, destination: tuple) -> bytes:
    """The header for a visitor at ``source`` that came to ``destination``.

    Each is (address, port). The header has one family for both: where they differ, the IPv4 one is
    written as IPv6 (::ffff:192.0.2.1). A zone (%eth0) is left out, it means nothing elsewhere.
    ``version`` is one of VERSIONS. Raises ValueError for what is no address, or no port.
    """
    (first, second), ports = _one_family(source[0], destination[0]), (source[1], destination[1])
    for port in ports:
        if not (isinstance(port, int) and 0 <= port <= _PORT_LIMIT):
            raise ValueError(f"port {port!r}, expected a number from 0 to {_PORT_LIMIT}")
    word, family = _FAMILIES[first.version]
    if version == "v1":
        return _LINE_START + f"{word} {first} {second} {ports[0]} {ports[1]}\r\n".encode("ascii")
    return _binary(_PROXY, family, _STREAM, first.packed + second.packed + _PORTS.pack(*ports))


def encode_unknown(version: str) -> bytes:
    """The header for a visitor whose address the gateway did not tell: the target must then take
    the connection's own, the agent's."""
    if version == "v1":
        return _LINE_START + f"{_UNKNOWN}\r\n".encode("ascii")
    return _binary(_LOCAL, _UNSPEC, _UNSPEC)


def _binary(command, family, transport, block=b""):
    head = _HEAD.pack(_VERSION << 4 | command, family << 4 | transport, len(block))
    return _SIGNATURE + head + block


def _one_family(*texts):
    """The addresses, all IPv4, or all IPv6."""
    addresses = [unmapped(ipaddress.ip_address(text.partition("%")[0])) for text in texts]
    if len({address.version for address in addresses}) == 1:
        return addresses
    return [
        ipaddress.IPv6Address(f"::ffff:{address}") if address.version == 4 else address
        for address in addresses
    ]


# Reading -----------------------------------------------------------------------------------------


def may_begin(data: bytes) -> bool:
    """Whether a header could start with ``data``, or ``data`` with a header.

    ``data`` may be its first bytes only; b"" says nothing yet, so it is True.
    """
    return any(start.startswith(data[: len(start)]) for start in _STARTS)


def begins(data: bytes) -> bool:
    """Whether ``data`` is long enough to be sure that it starts as a header does."""
    return data.startswith(_STARTS)


def parse(data: bytes) -> tuple[int, Source | None] | None:
    """Read the header at the start of ``data``, all that has come so far; None if more must come.

    Returns how many bytes the header takes, and the visitor. That is None if the proxy names none
    (UNKNOWN; LOCAL, as for its health checks; an unspecified family; a unix socket): then the
    connection's own address holds. Raises NotProxy as soon as the bytes break the rules.
    """
    if not may_begin(data):
        start = data[: len(_SIGNATURE)]
        raise NotProxy(f"{start!r} at the start, expected a header of the PROXY protocol")
    if not begins(data):
        return None
    return _parse_line(data) if data.startswith(_LINE_START) else _parse_binary(data)


def _parse_line(data):
    line, end, _ = data[:LINE_LIMIT].partition(b"\r\n")
    if not end:
        if len(data) < LINE_LIMIT:
            return None
        raise NotProxy(f"no CRLF in the first {LINE_LIMIT} bytes, expected a shorter PROXY line")
    return len(line) + len(end), _source_of(line.decode("latin-1"))


def _source_of(line):
    """The visitor in a line without its CRLF, None if it is unknown."""
    _, family, *words = line.split(" ")
    if family == _UNKNOWN:  # whatever follows it is to be ignored
        return None
    if family not in _LINE_FAMILIES:
        raise NotProxy(f"family {family!r} in {line!r}, expected TCP4, TCP6 or {_UNKNOWN}")
    if len(words) != 4:
        raise NotProxy(
            f"{len(words)} words behind {family} in {line!r}, "
            "expected two addresses and two ports with single spaces between them"
        )
    addresses = [_line_address(family, word, line) for word in words[:2]]
    ports = [_line_port(word, line) for word in words[2:]]
    return _source(addresses[0], ports[0])


def _line_address(family, word, line):
    try:
        if "%" in word:  # a zone, which means something on the proxy's machine only
            raise ValueError
        return _LINE_FAMILIES[family](word)
    except ValueError:
        raise NotProxy(f"{word!r} in {line!r}, expected an address of {family}") from None


def _line_port(word, line):
    if not _PORT.fullmatch(word) or int(word) > _PORT_LIMIT:
        raise NotProxy(f"{word!r} in {line!r}, expected a port from 0 to {_PORT_LIMIT}")
    return int(word)


def _parse_binary(data):
    # Each step judges bytes that have come and needs none behind them, so that a broken header is
    # refused at the same byte however it is cut.
    at = len(_SIGNATURE)
    if len(data) <= at:
        return None
    version, command = divmod(data[at], 16)
    if version != _VERSION:
        raise NotProxy(f"version {version} behind the PROXY signature, expected {_VERSION}")
    if command not in (_LOCAL, _PROXY):
        raise NotProxy(f"PROXY command {command}, expected LOCAL ({_LOCAL}) or PROXY ({_PROXY})")

    if len(data) <= at + 1:
        return None
    family, transport = divmod(data[at + 1], 16)
    if command == _LOCAL:  # what is said of addresses is to be ignored
        family = _UNSPEC
    elif family not in (_UNSPEC, _INET, _INET6, _UNIX):
        raise NotProxy(f"PROXY address family {family}, expected 0 to {_UNIX}")
    elif transport not in (_UNSPEC, _STREAM):
        raise NotProxy(f"PROXY transport {transport}, expected a stream ({_STREAM})")
    elif transport == _UNSPEC:
        family = _UNSPEC

    if len(data) < _FIXED:
        return None
    length = _HEAD.unpack_from(data, at)[2]
    end = _FIXED + length
    if end > HEADER_LIMIT:
        raise NotProxy(f"PROXY header of {end} bytes, expected at most {HEADER_LIMIT}")
    if length < _size_of_addresses(family):
        raise NotProxy(
            f"{length} bytes of PROXY addresses, expected at least {_size_of_addresses(family)}"
        )

    if len(data) < end:
        return None
    return end, _source_in(family, data[_FIXED:end])


def _size_of_addresses(family):
    """Bytes that both ends take in a header."""
    if family == _UNSPEC:
        return 0
    if family == _UNIX:
        return 2 * _UNIX_SIZE
    return 2 * _INET_SIZES[family] + _PORTS.size


def _source_in(family, block):
    if family not in _INET_SIZES:
        return None
    size = _INET_SIZES[family]
    port, _ = _PORTS.unpack_from(block, 2 * size)  # behind both addresses
    return _source(ipaddress.ip_address(block[:size]), port)


def _source(address, port):
    return Source(str(unmapped(address)), port)
