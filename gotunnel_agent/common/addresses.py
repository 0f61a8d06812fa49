"""IP addresses: in which form two are compared, what a peer is counted by, networks as text.

A socket for both families writes an IPv4 peer as an IPv4-mapped IPv6 address (::ffff:192.0.2.1;
RFC 4291 §2.5.5.2). Under two names it would pass a list that names it, and have two shares of every
limit. So a mapped address is always the IPv4 address in it.
"""

import functools
import ipaddress
import re
from collections.abc import Hashable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Bits of an IPv6 address that one subscriber shares (RFC 6177 §2). The other 64 are free to choose:
# counted by whole addresses, one machine would never use up a share.
IPV6_SUBSCRIBER = 64
MAPPED_BITS = 96  # length of the prefix of IPv4-mapped addresses

MOST_COUNTED = 4096  # addresses whose key is remembered: to read one takes 20 times as long
MOST_NETWORKS = 1000  # in one list of a policy; a registration holds 64 KiB
MOST_SHOWN = 60  # characters of a bad value that an error shows

# ipaddress also takes a mask after the slash (10.0.0.0/255.0.0.0) and a zone (fe80::1%eth0).
_NETWORK = re.compile(r"[0-9a-fA-F.:]{2,45}(/[0-9]{1,3})?")


def unmapped(address: Address) -> Address:
    """The address; of an IPv4-mapped one the IPv4 address."""
    return address if address.version == 4 else address.ipv4_mapped or address


def unmapped_host(host: str) -> str:
    """As ``unmapped``, for the text in a socket's address; once a connection, so nothing is
    parsed."""
    return host.removeprefix("::ffff:") if "." in host else host


def as_host(host: str) -> str:
    """A hostname or an IP address as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def parse(text: str) -> Address | None:
    """The address in ``text``, never a mapped one; None if the text is no address."""
    try:
        return unmapped(ipaddress.ip_address(text))
    except ValueError:
        return None


def subscriber(address: Address) -> Hashable:
    """The key under which a peer's share is counted: its IPv4 address, or the /64 of an IPv6 one.

    ``address`` is not mapped.
    """
    if address.version == 4:
        return int(address)
    return 6, int(address) >> address.max_prefixlen - IPV6_SUBSCRIBER


@functools.lru_cache(MOST_COUNTED)
def counted_by(text: str) -> Hashable:
    """As ``subscriber``, of an address as text; a text that is no address is counted by itself."""
    found = parse(text)
    return text if found is None else subscriber(found)


def network(text: str) -> Network:
    """The network in ``text``: an address, or ADDRESS/LENGTH without host bits.

    Raises ValueError, whose text says what came and what was expected.
    """
    try:
        if not _NETWORK.fullmatch(text):
            raise ValueError
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"{_shown(text)} came, expected an IP address or a network such as 10.0.0.0/8"
        ) from None
    if found.network_address != ipaddress.ip_address(text.partition("/")[0]):
        raise ValueError(
            f"{_shown(text)} has host bits, expected {found} for the network, or the address alone"
        )
    return found


def unmapped_network(network: Network) -> Network:
    """The network; of one that holds IPv4-mapped addresses only, the IPv4 network."""
    if network.version == 4 or network.prefixlen < MAPPED_BITS:
        return network
    first = network.network_address.ipv4_mapped
    return ipaddress.IPv4Network((first, network.prefixlen - MAPPED_BITS)) if first else network


def _shown(text):
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")
