"""Which gateways an agent has to reach, if several are one (feature MEMBERS). Pure: values in,
values out.

Each gateway tells the agent all members, by id, with the address that leads to each of them alone.
The agent has a link (link.py) to each. Some members have no address of their own, such as gateways
behind a balancer, or processes that share a port. For these a link dials the agent's tunnel_addr
again and again, and names the members with which the agent has sessions (Register.besides): one of
those answers ALREADY, any other one accepts the agent. One link at a time does so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .common.hostnames import normal_hostname, valid_host

# Members that an agent has sessions with. Each session costs a connection, four threads and about
# 170 KB; a visit that comes to any other member is passed on by that one.
MOST_MEMBERS = 64
MOST_ID = 64  # characters of a member's id; ours are 8
SHARED = ""  # the address of a member that has none of its own: tunnel_addr leads to it, too
_ID = re.compile(f"[0-9A-Za-z._-]{{1,{MOST_ID}}}")
# Seconds between dials that look for a member without an address, and how many are that quick for
# each such member. Of N members that get an equal share of the dials, 4 N dials leave out a certain
# one in 2 of 100 cases.
SEEK_DELAY = 0.02
QUICK_SEEKS = 4
# The same for an address of its own, doubled with each dial. A gateway that has come back there is
# another member, and the one before stays in the list for some seconds.
OWN_SEEK_DELAY = 0.5


class Place(NamedTuple):
    """Where to dial a gateway. ``name`` is its hostname for TLS: SNI, and what its certificate has
    to be valid for."""

    host: str  # a hostname or an IP address, without brackets
    port: int
    name: str

    def __str__(self) -> str:
        """For the log."""
        return f"{self.host}:{self.port}"


class View(NamedTuple):
    """A link, as the rules below see it."""

    address: str  # that it dials, SHARED for tunnel_addr
    member: str = ""  # that it has reached; "" none, or a gateway that is no member
    serves: bool = False  # it has a session that is neither old nor about to be replaced
    ends: bool = False  # it will not dial any more


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def place_of(address: str, name: str) -> Place | None:
    """The place at "HOST:PORT"; None if the text is something else. ``name``: see Place."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port and valid_host(address)):
        return None
    return Place(normal_hostname(host.removeprefix("[").removesuffix("]")), int(port), name)


def usable(told: Mapping[str, str]) -> dict[str, str]:
    """The members of a Members message that can be dialled, with their addresses. A peer may send
    anything; what is no id or no address is left out."""
    return {
        id: address
        for id, address in told.items()
        if is_id(id) and (address == SHARED or place_of(address, "") is not None)
    }


def chosen(members: Mapping[str, str], seed: str, reached: Iterable[str] = ()) -> dict[str, str]:
    """At most MOST_MEMBERS of them: first those that were ``reached``, then a random choice, which
    is the same for the same ``seed``. So agents are shared out evenly among very many gateways."""
    if len(members) <= MOST_MEMBERS:
        return dict(members)
    kept = set(reached)
    ranked = sorted(members, key=lambda id: (id not in kept, _rank(seed, id)))
    return {id: members[id] for id in ranked[:MOST_MEMBERS]}


def _rank(seed: str, id: str) -> bytes:
    return hashlib.blake2b(f"{seed} {id}".encode(), digest_size=8).digest()


def reached(links: Iterable[View]) -> set[str]:
    return {link.member for link in links if link.serves and link.member}


def wanted(members: Mapping[str, str], links: Sequence[View]) -> list[str]:
    """The addresses that lead to members without a session, each once."""
    missing = members.keys() - reached(links)
    return list(dict.fromkeys(members[id] for id in sorted(missing)))


def to_open(members: Mapping[str, str], links: Sequence[View]) -> list[str]:
    """The addresses for which a link has to be opened. The first of ``links`` is the agent's own,
    which dials tunnel_addr whenever that is needed."""
    dialled = {link.address for link in links if not link.serves and not link.ends}
    return [address for address in wanted(members, links) if address not in dialled]


def is_needed(members: Mapping[str, str], links: Sequence[View], index: int) -> bool:
    """Whether the link at ``index``, which has no session, has to dial."""
    link = links[index]
    if index == 0 and not any(other.serves for other in links):
        return True
    earlier = any(
        other.address == link.address and not other.serves and not other.ends
        for other in links[:index]
    )
    return link.address in wanted(members, links) and not earlier


def seek_delay(tries: int, members: Mapping[str, str], address: str = SHARED) -> float:
    """Seconds until the next dial of an address that has led to members that the agent has reached
    before, so many times in a row (at least once). Without a limit, before jitter."""
    if address != SHARED:
        return OWN_SEEK_DELAY * 2.0 ** min(tries - 1, 30)
    shared = sum(address == SHARED for address in members.values())
    late = max(0, tries - QUICK_SEEKS * max(1, shared))
    return SEEK_DELAY * 2.0 ** min(late, 30)
