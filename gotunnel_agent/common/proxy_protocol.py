"""The PROXY protocol: a header ahead of a visitor's bytes that names the visitor's address.

A program that passes bytes on unread cannot write X-Forwarded-For. Instead it sends the visitor's
address in this header, which HAProxy's doc/proxy-protocol.txt specifies (the sections named here
are its sections). The gateway and the agent both use it:

    the gateway   reads the header of a trusted proxy in front of it (HAProxy, nginx's stream
                  module, cloud load balancers)
    the agent     writes one to a target that expects it (nginx: ``listen ... proxy_protocol``),
                  since a target sees only the agent's address

There are two versions:

    1    PROXY TCP4 192.0.2.1 198.51.100.7 56324 443 CR LF
    2    signature (12 bytes), version and command (1), family and transport (1), length (2);
         then as many bytes: source, destination, source port, destination port, TLVs

The header holds for the whole connection, so two visitors must not share a connection.

This module parses and builds headers, and does no I/O. Any peer can send such a header; the caller
decides which peers it trusts.

The promise: whatever bytes come, ``parse`` returns a value or raises NotProxy, and the result does
not depend on how the bytes are cut. TLVs are ignored, CRC32c too: TCP has a checksum already, and
a receiver need not know this one (§2.2.3).
"""

import ipaddress
import re
import struct
from typing import NamedTuple

from .addresses import Address, unmapped

VERSIONS = ("v1", "v2")

# Longest version 1 header in bytes, CRLF included (§2.1).
LINE_LIMIT = 107
# Longest version 2 header that we accept, in bytes. The addresses take at most 216; TLVs with
# names, ids and facts of the visitor's TLS a few hundred more. The length field would allow 64 KiB.
HEADER_LIMIT = 2048

_LINE_START = b"PROXY "  # §2.1
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # §2.2
_STARTS = (_LINE_START, _SIGNATURE)

_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_PORT_LIMIT = 65535
_UNKNOWN = "UNKNOWN"  # version 1: the proxy knows no address
_LINE_FAMILIES: dict[str, type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]]
_LINE_FAMILIES = {"TCP4": ipaddress.IPv4Address, "TCP6": ipaddress.IPv6Address}

# §2.2: the fields behind the signature. The first two bytes hold two numbers of four bits each.
_HEAD = struct.Struct("!BBH")  # version and command, family and transport, length
_PORTS = struct.Struct("!HH")  # source, destination
_VERSION = 2
_LOCAL, _PROXY = 0, 1
_UNSPEC, _INET, _INET6, _UNIX = 0, 1, 2, 3
_STREAM = 1
_FIXED = len(_SIGNATURE) + _HEAD.size  # bytes before the addresses
_INET_SIZES = {_INET: 4, _INET6: 16}  # bytes of an address
_UNIX_SIZE = 108  # bytes of a path

# By IP version: the family's name in a header of version 1, and its number in version 2.
_FAMILIES = {4: ("TCP4", _INET), 6: ("TCP6", _INET6)}


class Source(NamedTuple):
    """The visitor's address as the proxy saw it; an IPv4-mapped one (::ffff:192.0.2.1) as IPv4."""

    address: str
    port: int


class NotProxy(Exception):
    """The bytes are no header of the PROXY protocol, or one that breaks its rules."""


# Writing -----------------------------------------------------------------------------------------


def encode(version: str, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """The header for a visitor at ``source`` that came to ``destination``.

    Each is (address, port). The header has one family for both: if they differ, the IPv4 one is
    written as IPv6 (::ffff:192.0.2.1). A zone (%eth0) is left out: it means nothing on another
    machine. ``version`` is one of VERSIONS. Raises ValueError for a bad address or port.
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
    """The header for a visitor whose address is unknown, since the gateway did not send it. The
    target then uses the address of the connection, which is the agent's."""
    if version == "v1":
        return _LINE_START + f"{_UNKNOWN}\r\n".encode("ascii")
    return _binary(_LOCAL, _UNSPEC, _UNSPEC)


def _binary(command: int, family: int, transport: int, block: bytes = b"") -> bytes:
    head = _HEAD.pack(_VERSION << 4 | command, family << 4 | transport, len(block))
    return _SIGNATURE + head + block


def _one_family(*texts: str) -> list[Address]:
    """The addresses in ``texts``, either all IPv4 or all IPv6."""
    addresses = [unmapped(ipaddress.ip_address(text.partition("%")[0])) for text in texts]
    if len({address.version for address in addresses}) == 1:
        return addresses
    return [
        ipaddress.IPv6Address(f"::ffff:{address}") if address.version == 4 else address
        for address in addresses
    ]


# Reading -----------------------------------------------------------------------------------------


def may_begin(data: bytes) -> bool:
    """Whether ``data`` starts like a header so far. True for b"": a header may still come."""
    return any(start.startswith(data[: len(start)]) for start in _STARTS)


def begins(data: bytes) -> bool:
    """Whether ``data`` starts with a whole signature of a header."""
    return data.startswith(_STARTS)


def parse(data: bytes) -> tuple[int, Source | None] | None:
    """Read the header at the start of ``data``, all that has come so far; None if more must come.

    Returns the header's length and the visitor. The visitor is None if the proxy names none
    (UNKNOWN; LOCAL, as in health checks; an unspecified family; a unix socket): then the address
    of the connection counts. Raises NotProxy as soon as the bytes break the rules.
    """
    if not may_begin(data):
        start = data[: len(_SIGNATURE)]
        raise NotProxy(f"{start!r} at the start, expected a header of the PROXY protocol")
    if not begins(data):
        return None
    return _parse_line(data) if data.startswith(_LINE_START) else _parse_binary(data)


def _parse_line(data: bytes) -> tuple[int, Source | None] | None:
    line, end, _ = data[:LINE_LIMIT].partition(b"\r\n")
    if not end:
        if len(data) < LINE_LIMIT:
            return None
        raise NotProxy(f"no CRLF in the first {LINE_LIMIT} bytes, expected a shorter PROXY line")
    return len(line) + len(end), _source_of(line.decode("latin-1"))


def _source_of(line: str) -> Source | None:
    """The visitor in a line without its CRLF; None if it is unknown."""
    _, family, *words = line.split(" ")
    if family == _UNKNOWN:  # the rest of the line must be ignored
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


def _line_address(family: str, word: str, line: str) -> Address:
    try:
        if "%" in word:  # a zone, which means something on the proxy's machine only
            raise ValueError
        return _LINE_FAMILIES[family](word)
    except ValueError:
        raise NotProxy(f"{word!r} in {line!r}, expected an address of {family}") from None


def _line_port(word: str, line: str) -> int:
    if not _PORT.fullmatch(word) or int(word) > _PORT_LIMIT:
        raise NotProxy(f"{word!r} in {line!r}, expected a port from 0 to {_PORT_LIMIT}")
    return int(word)


def _parse_binary(data: bytes) -> tuple[int, Source | None] | None:
    # Each step checks bytes that are here and needs none behind them, so a broken header is refused
    # at the same byte however the bytes are cut.
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
    if command == _LOCAL:  # its addresses must be ignored
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


def _size_of_addresses(family: int) -> int:
    """Bytes that the addresses and ports of both ends take in a header."""
    if family == _UNSPEC:
        return 0
    if family == _UNIX:
        return 2 * _UNIX_SIZE
    return 2 * _INET_SIZES[family] + _PORTS.size


def _source_in(family: int, block: bytes) -> Source | None:
    if family not in _INET_SIZES:
        return None
    size = _INET_SIZES[family]
    port, _ = _PORTS.unpack_from(block, 2 * size)  # behind both addresses
    return _source(ipaddress.ip_address(block[:size]), port)


def _source(address: Address, port: int) -> Source:
    return Source(str(unmapped(address)), port)
