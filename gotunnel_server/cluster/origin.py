"""What a gateway tells another one of its agents, as register messages.

Between gateways a Register stands for one agent's session (or for a part of it, if it would be too
long for a message) and may be repeated on the control stream: a later one with the same
``instance`` replaces the earlier one, and one without routes takes it back. Its ``token`` is no
JWT, since the connection has proved the peer (secret.py). It is a JSON array that says whose
hostnames they are: an Origin.

The first Register of a connection is a greeting: its ``instance`` is the member's id, and it has no
routes. docs/protocol.md, "Between gateways", has it all. Values in, values out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gotunnel import (
    HALF_CLOSE,
    HOST_HEADER,
    HTTP2,
    MESSAGE_LIMIT,
    PARTIAL,
    POLICIES,
    UPGRADES,
    VISITOR_ADDRESS,
    ProtocolError,
    Register,
    encode_message,
)
from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.one_line import on_one_line

from ..agents.agents_file import Limits
from ..agents.identity import Identity
from ..routes import Route

log = logging.getLogger("gotunnel.origin")

MOST_NAME = 100  # characters of a name in a token
# What read_routes() must take from any Register between gateways.
ALWAYS = (HOST_HEADER, HTTP2, PARTIAL, POLICIES, VISITOR_ADDRESS)


class Origin(NamedTuple):
    """An agent that is connected to another gateway.

    ``issuer`` and ``has_entry`` are of its credential, ``address`` is the IP address from which it
    came, ``limits`` are those for its certificate orders. ``limited``: its streams are counted
    there, so none is to be kept here. ``since``: wall-clock seconds of its registration.
    """

    issuer: str
    address: str
    has_entry: bool = False
    limits: Limits = Limits()
    limited: bool = False
    since: float = 0.0

    def encode(self) -> str:
        orders = self.limits.orders_per_hour, self.limits.orders_per_week
        return json.dumps([*self._replace(limits=orders)], separators=(",", ":"))  # type: ignore

    @classmethod
    def decode(cls, token: str) -> Origin:
        """Raises ProtocolError."""
        try:
            issuer, address, has_entry, orders, limited, since = json.loads(token)
            hour, week = orders
            limits = Limits(orders_per_hour=_limit(hour), orders_per_week=_limit(week))
            return cls(
                str(issuer), str(address), has_entry is True, limits, limited is True, float(since)
            )
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise ProtocolError("a peer's register whose token names no agent") from None


def _limit(value: object) -> int | None:
    return None if value is None else int(str(value))


class Greeting(NamedTuple):
    """The member that opens a connection. ``host`` is its machine's name."""

    id: str
    host: str

    def message(self) -> Register:
        return Register(self.host, {}, {}, instance=self.id)


@dataclass(frozen=True)
class OtherIdentity(Identity):
    """The identity of an Origin: its issuer is shown with the member behind it, its credential is
    the one that it has there. It may claim anything, as its own gateway has looked at that."""

    issuer_there: str = ""
    has_entry: bool = False
    orders: Limits = Limits()

    @property
    def credential(self) -> tuple[str, str]:
        return ("agent" if self.has_entry else "shared", self.issuer_there)

    @property
    def limits(self) -> Limits:
        return self.orders

    def why_not(self, hostname: str) -> str | None:
        return None


class OtherAgent:
    """An Origin as agents/registration.py shows an agent."""

    instance = ""
    overlaps = False

    def __init__(self, origin: Origin, via: str):
        """``via`` names the other gateway."""
        self.address = (origin.address, 0)
        name = on_one_line(origin.issuer, MOST_NAME) or origin.address
        self.identity = OtherIdentity(
            f"{name} via {via}", issuer_there=origin.issuer, has_entry=origin.has_entry,
            orders=origin.limits,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"agent {self.identity.issuer}"

    @property
    def host(self) -> str:
        return self.address[0]

    @property
    def blame(self) -> tuple[Hashable, ...]:
        """As the agent's own gateway has it: failed orders count for all members together."""
        credential = self.identity.credential
        return credential if self.identity.has_entry else (*credential, counted_by(self.host))

    def is_same_process(self, other: object) -> bool:
        return False


def origin_of(tunnel: Any) -> Origin:
    """The Origin of an agent here; ``tunnel`` is an agents/tunnel.Tunnel."""
    identity = tunnel.agent.identity
    limits = identity.limits
    return Origin(
        identity.issuer, tunnel.agent.host, identity.entry is not None, limits,
        limited=limits.streams is not None or limits.visits is not None, since=tunnel.since,
    )  # fmt: skip


def registers(tunnel: Any, routes: Mapping[str, Route]) -> Iterator[Register]:
    """The messages that tell of the ``routes`` of an agent here, each short enough to be sent. A
    hostname for which that is not possible is left out."""
    features = [*ALWAYS]
    features += [HALF_CLOSE] if tunnel.half_close else []
    features += [UPGRADES] if tunnel.upgrades else []
    token = origin_of(tunnel).encode()
    policies = tunnel.policies
    parts, number = [dict(routes)], 0
    while parts:
        part = parts.pop()
        message = Register(
            token,
            {name: route.target for name, route in part.items()},
            {name: route.mode for name, route in part.items() if route.mode != "http"},
            tuple(features),
            {name: route.host_header for name, route in part.items() if route.host_header},
            {},
            tuple(name for name, route in part.items() if _needs_address(route)),
            {name: policies[name] for name in part if name in policies},
            part_name(tunnel.id, number),
            protocols={name: route.protocol for name, route in part.items() if route.protocol},
        )
        if len(encode_message(message)) > MESSAGE_LIMIT:
            names = list(part)
            if len(part) == 1:  # with a very long policy, or issuer; the peer would hang up
                log.warning("%s: %s is not told to the other gateways, which so pass no visits on: "
                            "its policy is too long", tunnel.agent, names[0])  # fmt: skip
                continue
            for half in names[: len(names) // 2], names[len(names) // 2 :]:
                parts.append({name: part[name] for name in half})
            continue
        number += 1
        yield message


def _needs_address(route: Route) -> bool:
    """Whether the visitor's address must come along: for the agent, or for the choice of one."""
    return route.addressed or route.pool is not None and route.pool.sticky != ""


def part_name(id: str, number: int) -> str:
    """The ``instance`` of one of the messages for an agent here; ``id`` is its Tunnel.id."""
    return f"{id}.{number}"


def taking_back(instance: str) -> Register:
    """The message that takes an earlier one back."""
    return Register("", {}, {}, instance=instance)
