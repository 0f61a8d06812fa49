"""Reads what an agent asks for: a register message in, the wanted routes out, or why it gets none.

Values in, values out. A hostname that breaks a rule is refused alone, if the agent knows PARTIAL
and so tells its operator. Any other registration is refused as a whole: an agent that got half of
what its operator wrote would look as if all was well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gotunnel import HOST_HEADER, HTTP2, NAMES, PARTIAL, POOLS, VISITOR_ADDRESS, Register
from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.hostnames import (
    OPEN,
    normal_hostname,
    valid_host,
    valid_hostname,
    valid_open_name,
    valid_wildcard,
    why_no_hostname,
)
from gotunnel_agent.common.one_line import on_one_line, some
from gotunnel_agent.common.quantities import MOST_WEIGHT

from ..routes import ADDRESS, COOKIE, H2, H2C, Policy, Route, Tunnel
from . import scope
from .identity import Identity

MODES = ("http", "tcp")
MAX_INSTANCE = 64  # characters; ours are 32
MOST_TARGET = 300  # characters: a hostname, a port, and a little more
MOST_REASONS = 5  # in the text of a refusal

# read_policy(object, mode) reads a policy off the wire; the object is None if there is none. Raises
# ValueError.
ReadPolicy = Callable[[object, str], "Policy | None"]


class Agent(NamedTuple):
    """An agent whose token is good.

    ``address`` is as accept() gave it. ``instance`` is a random id that the agent's process keeps
    over its reconnects, "" if it has none. ``overlaps``: the agent says that its earlier session
    still runs, and should finish its visits.
    """

    address: tuple[Any, ...]
    identity: Identity
    instance: str
    overlaps: bool = False

    def __str__(self) -> str:
        """For the log: with the agent's name, if AGENTS_FILE has one."""
        named = "" if self.identity.entry is None else f" {self.identity.name}"
        return f"agent{named} at {self.host}"

    @property
    def host(self) -> str:
        """Its IP address."""
        return str(self.address[0])

    @property
    def blame(self) -> tuple[Hashable, ...]:
        """What is to blame if a certificate order fails: the key by which failures are counted.
        It is the credential. Agents with the common secret also differ by their addresses (IPv6:
        by their /64)."""
        credential = self.identity.credential
        if self.identity.entry is not None:
            return credential
        return (*credential, counted_by(self.host))

    def is_same_process(self, other: Agent) -> bool:
        """Whether this is the same process as ``other``. The credential must be the same as well:
        an instance proves nothing by itself."""
        return (
            self.instance != ""
            and self.instance == other.instance
            and self.identity.credential == other.identity.credential
        )


class Terms(NamedTuple):
    """What registrations may ask for, by the gateway's settings.

    ``most`` hostnames may be in one message. Targets of the hostnames in ``h2c_hosts`` (patterns,
    see scope.py) speak H2C though their agents do not say so. ``speaks_http2``: the library for
    HTTP/2 is installed.
    """

    most: int
    read_policy: ReadPolicy
    h2c_hosts: tuple[str, ...] = ()
    speaks_http2: bool = False


NO_ROUTES = "no routes"  # the refusal of a registration without hostnames


class NotGranted(Exception):
    """The registration, or one hostname of it, is refused; the text is for the agent's operator.
    ``denied``: the texts for the hostnames, if all were refused one by one."""

    def __init__(self, text: str, denied: Mapping[str, str] = MappingProxyType({})):
        super().__init__(text)
        self.denied = denied


class Pooled(NamedTuple):
    """How an agent shares a hostname with others (pool.py). ``weight``: how many visits it gets,
    relative to the others. ``sticky``: by what a visitor keeps its agent, COOKIE, ADDRESS or "".
    ``policy``: what the agent has sent as the hostname's policy; ``read_by``: what has read it."""

    weight: int = 1
    sticky: str = ""
    policy: Any = None
    read_by: object = None


class Wanted(NamedTuple):
    """A Route that an agent asks for. The fields are the Route's, but for ``name`` and ``pooled``.
    ``name`` is how the agent spells the hostname in its registration; it differs from the Route's
    if it is an open name. ``pooled`` is None if the agent wants the hostname for itself."""

    name: str
    hostname: str
    mode: str
    host_header: str | None
    addressed: bool
    target_port: int | None
    policy: Policy | None
    protocol: str
    target: str
    pooled: Pooled | None = None

    def route(self, tunnel: Tunnel) -> Route:
        return Route(
            self.hostname, self.mode, tunnel, self.host_header,
            addressed=self.addressed, target_port=self.target_port, policy=self.policy,
            protocol=self.protocol, target=self.target,
        )  # fmt: skip


class Asked(NamedTuple):
    """What a register message asks for. ``routes`` is by hostname in its normal form, as are
    ``policies`` in the form in which they came. ``denied`` says why a hostname gets none, by
    hostname as the agent spells it."""

    routes: dict[str, Wanted]
    denied: dict[str, str]
    policies: Mapping[str, object] = MappingProxyType({})


def read_routes(message: Register, identity: Identity, terms: Terms) -> Asked:
    """Raises NotGranted if no hostname is left, or if one is denied and the agent does not know
    PARTIAL."""
    if not message.routes:
        raise NotGranted(NO_ROUTES)
    if len(message.routes) > terms.most:
        raise NotGranted(
            f"too many hostnames: {len(message.routes)}, at most {terms.most} (MAX_HOSTS_PER_AGENT)"
        )
    if len(message.instance) > MAX_INSTANCE:
        raise NotGranted(f"an instance of more than {MAX_INSTANCE} characters")
    is_partial = PARTIAL in message.features
    completes = identity if NAMES in message.features else None
    policies = _by_hostname(message, completes)
    unused = set(policies)
    routes: dict[str, Wanted] = {}
    denied: dict[str, str] = {}
    # Agents of a Go gateway register "name:port" beside "name". To us they are the same hostname;
    # the shortest spelling, the plain one, comes first and stays. Open names come last: which
    # hostname one gets is the gateway's choice, so it must not take a hostname that is spelled out.
    for name in sorted(message.routes, key=lambda name: (name.endswith(OPEN), len(name))):
        try:
            hostname = _hostname(name, completes)
            unused.discard(hostname)
            if hostname not in routes:  # nor denied under another spelling: it is protected alike
                policy = policies.get(hostname)
                routes[hostname] = _wanted(message, name, hostname, policy, terms)
            elif name.endswith(OPEN):
                raise NotGranted(f"host already registered: {hostname}, by the same agent")
        except NotGranted as error:
            if not is_partial:
                raise
            denied[name] = str(error)
    if unused:  # such a policy would protect nothing
        raise NotGranted(f"a policy for {min(unused)}, which is not among the routes")
    reasons = {hostname: identity.why_not(hostname) for hostname in routes}
    if refused := [hostname for hostname, reason in reasons.items() if reason]:
        if not is_partial:
            raise NotGranted(f"not allowed: {some(refused)}: {reasons[refused[0]]}")
        for hostname in refused:
            denied[routes.pop(hostname).name] = f"not allowed: {hostname}: {reasons[hostname]}"
    if not routes:
        raise NotGranted(of_all(denied), denied)
    return Asked(routes, denied, policies)


def of_all(denied: Mapping[str, str]) -> str:
    """Why a registration is refused whose hostnames were all denied."""
    reasons = list(dict.fromkeys(denied.values()))
    more = f"; and {len(reasons) - MOST_REASONS} more" if len(reasons) > MOST_REASONS else ""
    return "; ".join(reasons[:MOST_REASONS]) + more


def _wanted(message: Register, name: str, hostname: str, policy: object, terms: Terms) -> Wanted:
    """The route of one hostname. Raises NotGranted."""
    mode = message.modes.get(name) or "http"
    if mode not in MODES:
        raise NotGranted(f"unknown mode of {name}: {on_one_line(mode, 20)}")
    host = message.host_headers.get(name) if HOST_HEADER in message.features else None
    if host is not None and not valid_host(host):
        raise NotGranted(f"invalid host_header of {name}: {host[:253]!r}")
    try:
        read = terms.read_policy(policy, mode)
    except ValueError as error:
        raise NotGranted(f"invalid policy of {name}: {error}") from None
    return Wanted(
        name, hostname if name.endswith(OPEN) else name, mode, host,
        addressed=name in message.addressed and VISITOR_ADDRESS in message.features,
        target_port=_port_of(message.routes[name]),
        policy=read,
        protocol=_protocol(message, name, hostname, mode, terms),
        target=message.routes[name][:MOST_TARGET],
        pooled=_pooled(message, name, mode, policy, terms.read_policy),
    )  # fmt: skip


def _hostname(name: str, completes: Identity | None) -> str:
    """The hostname in a route's name, in its normal form. The wildcard of ``completes`` completes
    an open name; None if the agent does not know NAMES. Raises NotGranted."""
    text, colon, port = name.partition(":")
    hostname = normal_hostname(text)
    if colon and not re.fullmatch("[0-9]{1,5}", port):
        hostname = ""
    if completes is not None and name.endswith(OPEN) and valid_open_name(hostname):
        if not completes.wildcard:
            raise NotGranted(
                f"not allowed: {name}: the credential has no wildcard, such as *.dev.example.com, "
                f"that could complete it; it may claim {completes.may_claim}; one with a wildcard "
                "is made by gotunnel-server agents add NAME --hosts '*.dev.example.com'"
            )
        hostname = hostname.removesuffix(OPEN) + completes.wildcard.removeprefix("*")
    if valid_hostname(hostname) or valid_wildcard(hostname):
        return hostname
    raise NotGranted(
        f"invalid hostname: {on_one_line(name, 253)}; expected letters, digits, hyphens and dots, "
        f"or *. and at least two labels{why_no_hostname(text)}"
    )


def _protocol(message: Register, name: str, hostname: str, mode: str, terms: Terms) -> str:
    """What a target speaks: H2C or H2, "" for HTTP/1.1. Raises NotGranted."""
    protocol = message.protocols.get(name, "") if HTTP2 in message.features else ""
    if protocol not in ("", H2C, H2):
        raise NotGranted(f"unknown protocol of {name}: {on_one_line(protocol, 20)}")
    if mode != "http":
        if protocol:
            raise NotGranted(f"a protocol of {name}, which has mode {mode}")
        return ""
    if not protocol and scope.allows(terms.h2c_hosts, hostname):
        return H2C
    if protocol and not terms.speaks_http2:
        raise NotGranted(
            f"{name} has protocol {protocol}, and this gateway lacks the Python package h2: its "
            "operator can install it (pip install h2)"
        )
    return protocol


def _pooled(
    message: Register, name: str, mode: str, policy: object, read_by: object
) -> Pooled | None:
    """How the agent shares a hostname; None if it does not. Raises NotGranted."""
    wire = message.pools.get(name) if POOLS in message.features else None
    if wire is None:
        return None
    if not isinstance(wire, dict) or not wire.keys() <= {"weight", "sticky"}:
        raise NotGranted(f"invalid pool of {name}: expected an object with weight, sticky, or none")
    if not message.instance:
        raise NotGranted(f"invalid pool of {name}: its agents need an instance")
    weight, sticky = wire.get("weight", 1), wire.get("sticky", "")
    if type(weight) is not int or not 1 <= weight <= MOST_WEIGHT:
        raise NotGranted(
            f"invalid pool of {name}: weight: expected a whole number from 1 to {MOST_WEIGHT}"
        )
    if sticky not in ("", COOKIE, ADDRESS):
        raise NotGranted(f"invalid pool of {name}: sticky: expected {COOKIE} or {ADDRESS}")
    if sticky == COOKIE and mode != "http":
        raise NotGranted(f"invalid pool of {name}: sticky: mode {mode} has no cookies")
    return Pooled(weight, sticky, policy, read_by)


def _by_hostname(message: Register, completes: Identity | None) -> dict[str, object]:
    """The policies, keyed by normalised hostname: under another spelling a policy would never be
    found, and its tunnel would be unprotected."""
    found: dict[str, object] = {}
    for name, policy in message.policies.items():
        try:
            hostname = _hostname(name, completes)
        except NotGranted:
            if name not in message.routes:
                raise
            continue  # its route is refused for the same reason
        if policy is None:  # it may mean no policy, or a policy that got lost: stay protected
            raise NotGranted(f"invalid policy of {hostname}: null came, expected an object")
        if hostname in found and found[hostname] != policy:
            raise NotGranted(f"two policies for {hostname}")
        found[hostname] = policy
    return found


def _port_of(target: str) -> int | None:
    """The port of a target, which agents write as "HOST:PORT"; None if there is none."""
    port = target.rpartition(":")[2]
    return int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else None
