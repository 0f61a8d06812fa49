"""Who a visitor is: the fields that tell the target, and whose word about others is taken.

A target sees only its agent. What it learns of the visitor stands in X-Forwarded-For, -Proto and
-Host and in X-Real-IP, so a visitor must not be able to write them: what comes under these names,
or as Forwarded (RFC 7239), is dropped and said anew, unless it comes from one of the
TRUSTED_PROXIES. Such a proxy knows its visitors as we know ours; its fields are kept, and the lists
among them grow by the proxy's own address.

Values in, values out. Addresses are text; an IPv4 address that came in an IPv6 one's clothes
(::ffff:192.0.2.1) is written and compared as what it is.
"""

import re
from collections.abc import Iterable

from gotunnel_agent.common import addresses
from gotunnel_agent.common.http1 import Fields, plain_name

# Kinds of fields (http1.kind) that tell a target who its visitor is.
KINDS = frozenset({"forwarded", "x-forwarded-*", "x-real-ip"})
# How proxies write an address with a port behind it.
_WITH_PORT = re.compile(r"\[([^\]]*)\](?::[0-9]+)?|([^:]*):[0-9]+")


class Proxies:
    """The addresses whose word about others is taken."""

    def __init__(self, networks: Iterable = ()):
        """``networks``: of the ipaddress module; no IPv4 one in IPv6's form."""
        self._networks = tuple(networks)

    def __contains__(self, address: str) -> bool:
        if not self._networks:  # as almost everywhere: spare each request the reading
            return False
        parsed = _parse(address)
        return parsed is not None and any(parsed in network for network in self._networks)


def fields(came: Fields, peer: str, scheme: str, host: str, proxies: Proxies) -> list:
    """The fields that tell a target who visits, as (name, value) pairs.

    ``came``: the request's fields. ``peer``: the address of the connection that brought it, by
    ``scheme``, "http" or "https". ``host``: its Host.
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
        # Only as the proxy spells them: X-Forwarded-Client_Cert may be what its visitor has sent.
        if (lower := name.lower()).startswith("x-forwarded-")
        and lower not in ours
        and lower == plain_name(name)
    ]


def came_by_https(came: Fields, peer: str, proxies: Proxies) -> bool:
    """Whether a trusted proxy at ``peer`` says that it has ended its visitor's TLS."""
    if peer not in proxies:
        return False
    schemes = ",".join(came.all("x-forwarded-proto")).split(",")
    return schemes[-1].strip(" \t").lower() == "https"  # the last one is the proxy's own word


def visitor(came: Fields, peer: str, proxies: Proxies) -> str:
    """The visitor's address: ``peer``, or the one that a trusted proxy names. A proxy may name
    a visitor without an address: then it is "", which is on no list of addresses."""
    if peer not in proxies:
        return peer
    chain = _chain(came)
    client = _client(chain, peer, proxies)
    hidden = client in proxies and any(_parse(entry) is None for entry in chain)
    return "" if hidden else client


def _chain(came):
    """The addresses that proxies have written down, the visitor's first."""
    # A proxy that makes no list names its visitor alone.
    line = ", ".join(came.all("x-forwarded-for")) or came.get("x-real-ip", "")
    return [entry for part in line.split(",") if (entry := part.strip(" \t"))]


def _told(forwarded_for, client, scheme, host):
    return [
        ("X-Forwarded-For", forwarded_for),
        ("X-Forwarded-Proto", scheme),
        ("X-Forwarded-Host", host),
        ("X-Real-IP", client),
    ]


def _client(chain, peer, proxies) -> str:
    """The rightmost address that is no trusted proxy's: each entry was written by the one to its
    right, so what stands left of a stranger is that stranger's word. Where all are trusted, the
    leftmost; where an entry is no address, the one to its right."""
    client = peer
    for entry in reversed(chain):
        address = _parse(entry)
        if address is None:
            break
        client = str(address)
        if client not in proxies:
            break
    return client


def _parse(text):
    """The address in ``text``, None if it is none; a port behind it is passed over."""
    match = _WITH_PORT.fullmatch(text)
    return addresses.parse(match[1] or match[2] if match else text)
