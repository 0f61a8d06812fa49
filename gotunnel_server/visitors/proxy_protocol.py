"""The visitor's address out of the header that a front proxy sends before the visitor's own bytes.

A proxy that passes bytes on as they come (HAProxy, nginx's stream module, the balancers of clouds)
cannot write X-Forwarded-For. It says who visits in a header ahead of everything else: the PROXY
protocol, HAProxy's doc/proxy-protocol.txt, to which the sections named here belong. There are two
forms:

    version 1    PROXY TCP4 192.0.2.1 198.51.100.7 56324 443 CR LF
    version 2    signature (12), version and command (1), family and transport (1), length (2);
                 then so many bytes: source, destination, source port, destination port, TLVs

Bytes in, values out. Whose header is believed is the caller's business; anybody can write one.

The promise: whatever bytes come, ``parse`` returns a value or raises NotProxy. It says the same of
the same bytes, whether they come at once or one at a time. What the proxy adds as TLVs is passed
over, its CRC32c too: TCP has a checksum already, and a receiver need not know this one (§2.2.3).
"""

import ipaddress
import re
from typing import NamedTuple

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
_LINE_FAMILIES = {"TCP4": ipaddress.IPv4Address, "TCP6": ipaddress.IPv6Address}

# §2.2: the numbers in the two bytes behind the signature, each in four bits.
_VERSION = 2
_LOCAL, _PROXY = 0, 1
_UNSPEC, _INET, _INET6, _UNIX = 0, 1, 2, 3
_STREAM = 1
_FIXED = 16  # bytes before the addresses
_INET_SIZES = {_INET: 4, _INET6: 16}  # bytes of an address
_PORT_SIZE = 2  # bytes
_UNIX_SIZE = 108  # bytes of a path


class Source(NamedTuple):
    """Where a visitor comes from, as the proxy has seen it.

    An IPv4 address that came in an IPv6 one's clothes (::ffff:192.0.2.1) is written as IPv4.
    """

    address: str
    port: int


class NotProxy(Exception):
    """These bytes are no header of the PROXY protocol, or one that breaks the rules."""


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


# Version 1 ---------------------------------------------------------------------------------------


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
    if family == "UNKNOWN":  # whatever follows it is to be ignored
        return None
    if family not in _LINE_FAMILIES:
        raise NotProxy(f"family {family!r} in {line!r}, expected TCP4, TCP6 or UNKNOWN")
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


# Version 2 ---------------------------------------------------------------------------------------


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
    length = int.from_bytes(data[_FIXED - 2 : _FIXED], "big")
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
    return 2 * (_INET_SIZES[family] + _PORT_SIZE)


def _source_in(family, block):
    if family not in _INET_SIZES:
        return None
    size = _INET_SIZES[family]
    port = block[2 * size : 2 * size + _PORT_SIZE]  # behind both addresses
    return _source(ipaddress.ip_address(block[:size]), int.from_bytes(port, "big"))


def _source(address, port):
    return Source(str(getattr(address, "ipv4_mapped", None) or address), port)
