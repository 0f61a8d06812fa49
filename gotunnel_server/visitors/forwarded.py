"""Tells the target the visitor's address, and decides which proxies may name another one.

A target sees only the connection of its agent. It learns about the visitor from X-Forwarded-For,
X-Forwarded-Proto, X-Forwarded-Host and X-Real-IP. A visitor could forge these fields, and Forwarded
(RFC 7239), so the gateway removes them and writes its own. Only the fields of TRUSTED_PROXIES are
kept; the lists among them are extended by the proxy's own address.

Values in, values out. Addresses are text. An IPv4-mapped IPv6 address (::ffff:192.0.2.1) is written
and compared as IPv4.
"""

import re
from collections.abc import Iterable

from gotunnel_agent.common import addresses
from gotunnel_agent.common.http1 import Fields, plain_name

# Kinds of fields (http1.kind) that tell a target its visitor's address.
KINDS = frozenset({"forwarded", "x-forwarded-*", "x-real-ip"})
# Spellings of an address with a port, as some proxies write them.
_WITH_PORT = re.compile(r"\[([^\]]*)\](?::[0-9]+)?|([^:]*):[0-9]+")


class Proxies:
    """The addresses of trusted proxies, which may name their visitors."""

    def __init__(self, networks: Iterable[addresses.Network] = ()):
        """``networks``: none of them IPv4-mapped."""
        self._networks = tuple(networks)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: object) -> bool:
        if not self._networks:  # the usual case: do not parse the address for each request
            return False
        parsed = _parse(str(address))
        return parsed is not None and any(parsed in network for network in self._networks)


def fields(
    came: Fields, peer: str, scheme: str, host: str, proxies: Proxies
) -> list[tuple[str, str]]:
    """The fields that tell a target about its visitor, as (name, value) pairs.

    ``came``: the fields that came with the request. ``peer``: the address of its connection.
    ``scheme``: "http" or "https". ``host``: its Host.
    """
    if peer not in proxies:
        return _told(peer, peer, scheme, host)
    chain = _chain(came)
    told = _told(
        ", ".join([*chain, peer]),
        _client(chain, peer, proxies),
        ", ".join(came.all("x-forwarded-proto")) or scheme,
        ", ".join(came.all("x-forwarded-host")) or host,
    )
    if "forwarded" in came:
        node = f'"[{peer}]"' if ":" in peer else peer  # RFC 7239 §6
        hop = f'for={node};host="{host}";proto={scheme}'
        told.append(("Forwarded", ", ".join([*came.all("forwarded"), hop])))
    ours = {name.lower() for name, _ in told}
    return told + [
        (name, value)
        for name, value in came  # X-Forwarded-Port, -Prefix and the like
        # Only in the plain spelling: a proxy that removes X-Forwarded-Client-Cert from a visitor's
        # request may pass on X-Forwarded-Client_Cert, which many targets read as the same field.
        if (lower := name.lower()).startswith("x-forwarded-")
        and lower not in ours
        and lower == plain_name(name)
    ]


def came_by_https(came: Fields, peer: str, proxies: Proxies) -> bool:
    """Whether a trusted proxy at ``peer`` says that its visitor came by https."""
    if peer not in proxies:
        return False
    schemes = ",".join(came.all("x-forwarded-proto")).split(",")
    return schemes[-1].strip(" \t").lower() == "https"  # the last one is what the proxy added


def visitor(came: Fields, peer: str, proxies: Proxies) -> str:
    """The visitor's address: ``peer``, or what a trusted proxy says. A proxy may hide the address
    ("unknown", RFC 7239 §6.2); then it is "", which matches no list of addresses."""
    if peer not in proxies:
        return peer
    chain = _chain(came)
    client = _client(chain, peer, proxies)
    hidden = client in proxies and any(_parse(entry) is None for entry in chain)
    return "" if hidden else client


def _chain(came: Fields) -> list[str]:
    """The addresses that proxies have added, the visitor's first."""
    # Some proxies write X-Real-IP only.
    line = ", ".join(came.all("x-forwarded-for")) or came.get("x-real-ip") or ""
    return [entry for part in line.split(",") if (entry := part.strip(" \t"))]


def _told(forwarded_for: str, client: str, scheme: str, host: str) -> list[tuple[str, str]]:
    """The fields with which the target is told of its visitor, as (name, value) pairs."""
    return [
        ("X-Forwarded-For", forwarded_for),
        ("X-Forwarded-Proto", scheme),
        ("X-Forwarded-Host", host),
        ("X-Real-IP", client),
    ]


def _client(chain: list[str], peer: str, proxies: Proxies) -> str:
    """The rightmost address that is not a trusted proxy's. Each entry was written by the one to its
    right, so entries to the left of an untrusted address may be forged. If all are trusted, it is
    the leftmost; if an entry is no address, the one to its right."""
    client = peer
    for entry in reversed(chain):
        address = _parse(entry)
        if address is None:
            break
        client = str(address)
        if client not in proxies:
            break
    return client


def _parse(text: str) -> addresses.Address | None:
    """The address in ``text``, None if there is none. A port behind it is ignored."""
    match = _WITH_PORT.fullmatch(text)
    return addresses.parse(match[1] or match[2] if match else text)
