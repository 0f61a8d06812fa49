"""The header that tells a target who visits: the PROXY protocol, for targets that read no http.

A target sees only its agent. If its tunnel says ``proxy_protocol: v1`` or ``v2``, and the target
is set up to expect it (nginx: ``listen ... proxy_protocol``), the visitor's address goes ahead of
the visitor's bytes, in the form of HAProxy's doc/proxy-protocol.txt (version 1: §2.1, 2: §2.2).
All visits of a connection are the one visitor's then, so no two visitors may share it.

Values in, bytes out.
"""

import ipaddress
import struct

VERSIONS = ("v1", "v2")

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_HEAD = struct.Struct("!BBH")  # version and command, family and transport, length of what follows
_PORTS = struct.Struct("!HH")
_LOCAL, _PROXY = 0x20, 0x21  # version 2 in the upper four bits
_UNSPEC = 0x00
# TCP over IPv4 and IPv6, as version 1 and as version 2 write it; by ipaddress's number.
_TRANSPORTS = {4: ("TCP4", 0x11), 6: ("TCP6", 0x21)}
_PORT_LIMIT = 65535


def encode(version: str, source: tuple, destination: tuple) -> bytes:
    """The header for a visitor at ``source`` who came to ``destination``.

    Each is (address, port). The header has one family for both: where they differ, the IPv4 one is
    written as IPv6 (::ffff:192.0.2.1). A zone (%eth0) is left out, it means nothing elsewhere.
    ``version`` is one of VERSIONS. Raises ValueError for what is no address, or no port.
    """
    (first, second), ports = _one_family(source[0], destination[0]), (source[1], destination[1])
    for port in ports:
        if not (isinstance(port, int) and 0 <= port <= _PORT_LIMIT):
            raise ValueError(f"port {port!r}, expected a number from 0 to {_PORT_LIMIT}")
    word, code = _TRANSPORTS[first.version]
    if version == "v1":
        return f"PROXY {word} {first} {second} {ports[0]} {ports[1]}\r\n".encode("ascii")
    block = first.packed + second.packed + _PORTS.pack(*ports)
    return _SIGNATURE + _HEAD.pack(_PROXY, code, len(block)) + block


def encode_unknown(version: str) -> bytes:
    """The header for a visitor whose address the gateway did not tell: the target must then take
    the connection's own, the agent's."""
    if version == "v1":
        return b"PROXY UNKNOWN\r\n"
    return _SIGNATURE + _HEAD.pack(_LOCAL, _UNSPEC, 0)


def _one_family(*texts):
    """The addresses, all IPv4, or all IPv6."""
    addresses = [_address(text) for text in texts]
    if len({address.version for address in addresses}) == 1:
        return addresses
    return [
        ipaddress.IPv6Address(f"::ffff:{address}") if address.version == 4 else address
        for address in addresses
    ]


def _address(text):
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
