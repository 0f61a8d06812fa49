"""IP addresses: the form in which they are compared, the key by which a peer's share of a limit is
counted, and networks as text.

A socket for both families writes an IPv4 peer as an IPv4-mapped IPv6 address (::ffff:192.0.2.1;
RFC 4291 §2.5.5.2). With two spellings a peer would slip through a deny list, and have two shares of
every limit. So we always replace a mapped address by the IPv4 address in it.
"""

import functools
import ipaddress
import re
from collections.abc import Hashable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Prefix length by which IPv6 peers are counted: a subscriber gets at least a /64 (RFC 6177 §2) and
# chooses the other 64 bits freely. Counted by whole addresses, one machine would have a new share
# with every address.
IPV6_SUBSCRIBER = 64
MAPPED_BITS = 96  # length of the prefix of IPv4-mapped addresses

MOST_COUNTED = 4096  # cached keys of addresses; parsing an address takes 20 times as long
MOST_NETWORKS = 1000  # in one list of a policy; a register message holds 64 KiB
MOST_SHOWN = 60  # characters of a bad value that an error shows

# Stricter than ipaddress, which accepts a mask (10.0.0.0/255.0.0.0) and a zone (fe80::1%eth0).
_NETWORK = re.compile(r"[0-9a-fA-F.:]{2,45}(/[0-9]{1,3})?")


def unmapped(address: Address) -> Address:
    """The IPv4 address in an IPv4-mapped one; any other address as it is."""
    return address if address.version == 4 else address.ipv4_mapped or address


def unmapped_host(host: str) -> str:
    """As ``unmapped``, for the text in a socket's address. It does not parse the address, to save
    time: it runs for every connection."""
    return host.removeprefix("::ffff:") if "." in host else host


def as_host(host: str) -> str:
    """A hostname or an IP address as a URL writes it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def parse(text: str) -> Address | None:
    """The address in ``text``, unmapped; None if the text is no address."""
    try:
        return unmapped(ipaddress.ip_address(text))
    except ValueError:
        return None


def subscriber(address: Address) -> Hashable:
    """The key by which a peer's share is counted: its IPv4 address, or the /64 of its IPv6 one.

    ``address`` is unmapped.
    """
    if address.version == 4:
        return int(address)
    return 6, int(address) >> address.max_prefixlen - IPV6_SUBSCRIBER


@functools.lru_cache(MOST_COUNTED)
def counted_by(text: str) -> Hashable:
    """As ``subscriber``, for an address as text. A text that is no address is its own key."""
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
    """The IPv4 network for a network of IPv4-mapped addresses; any other network as it is."""
    if network.version == 4 or network.prefixlen < MAPPED_BITS:
        return network
    first = network.network_address.ipv4_mapped
    return ipaddress.IPv4Network((first, network.prefixlen - MAPPED_BITS)) if first else network


def _shown(text: str) -> str:
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")
