"""What an agent asks for, read: a register message in, Routes out, or why not.

Values in, values out. Nothing of a registration that breaks a rule is served: an agent that gets
half of what its operator wrote would look as if all was well.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gotunnel import HOST_HEADER, VISITOR_ADDRESS
from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.hostnames import (
    normal_hostname,
    valid_host,
    valid_hostname,
    valid_wildcard,
)
from gotunnel_agent.common.one_line import on_one_line

from ..routes import Route

MODES = ("http", "tcp")
MAX_INSTANCE = 64  # characters; ours are 32


class Agent(NamedTuple):
    """An agent whose token is good.

    ``address`` is as accept() gave it. ``identity`` is a credentials.Identity. ``instance`` is a
    random id that the agent's process keeps over its reconnects, "" if it has none.
    """

    address: tuple
    identity: object
    instance: str

    def __str__(self):
        """For the log: with the agent's name, if AGENTS_FILE has one."""
        named = "" if self.identity.entry is None else f" {self.identity.name}"
        return f"agent{named} at {self.host}"

    @property
    def host(self) -> str:
        """Its IP address."""
        return self.address[0]

    @property
    def blame(self) -> tuple:
        """What failed orders of certificates are counted by. Agents with the common secret are
        told apart by their addresses (IPv6: by their /64)."""
        credential = self.identity.credential
        if self.identity.entry is not None:
            return credential
        return (*credential, counted_by(self.host))

    def is_again(self, other: "Agent") -> bool:
        """Whether this is the same process as ``other``. The credential has to be the same, as the
        instance proves nothing by itself."""
        return (
            self.instance != ""
            and self.instance == other.instance
            and self.identity.credential == other.identity.credential
        )


class NotGranted(Exception):
    """The agent gets nothing; the text is for its operator."""


def read_routes(message, identity, most: int, read_policy: Callable) -> dict:
    """The Routes that a Register message asks for: hostname, in its normal form, to Route, which
    has no tunnel yet.

    ``identity`` is a credentials.Identity. ``most`` hostnames may be in one message.
    ``read_policy(object, mode)`` reads a policy off the wire, None if there is none; what it raises
    is a ValueError. Raises NotGranted.
    """
    if not message.routes:
        raise NotGranted("no routes")
    if len(message.routes) > most:
        raise NotGranted(
            f"too many hostnames: {len(message.routes)}, at most {most} (MAX_HOSTS_PER_AGENT)"
        )
    if len(message.instance) > MAX_INSTANCE:
        raise NotGranted(f"an instance of more than {MAX_INSTANCE} characters")
    policies = _by_hostname(message.policies)
    host_headers = message.host_headers if HOST_HEADER in message.features else {}
    routes = {}
    # Agents of a Go gateway register "name:port" too, which is all one to us. The shortest
    # spelling, which is the plain one, comes first and stays.
    for name in sorted(message.routes, key=len):
        hostname = _hostname(name)
        if hostname in routes:
            continue
        mode = message.modes.get(name) or "http"
        if mode not in MODES:
            raise NotGranted(f"unknown mode of {name}: {on_one_line(mode, 20)}")
        host = host_headers.get(name)
        if host is not None and not valid_host(host):
            raise NotGranted(f"invalid host_header of {name}: {host[:253]!r}")
        try:
            policy = read_policy(policies.pop(hostname, None), mode)
        except ValueError as error:
            raise NotGranted(f"invalid policy of {name}: {error}") from None
        routes[hostname] = Route(
            name, mode, None, host,
            addressed=name in message.addressed and VISITOR_ADDRESS in message.features,
            target_port=_port_of(message.routes[name]),
            policy=policy,
        )  # fmt: skip
    if policies:  # it would protect nothing
        raise NotGranted(f"a policy for {next(iter(policies))}, which is not among the routes")
    _check_may_claim(routes, identity)
    return routes


def _hostname(name):
    """The hostname in a route's name, in its normal form; raises NotGranted."""
    text, colon, port = name.partition(":")
    hostname = normal_hostname(text)
    if colon and not re.fullmatch("[0-9]{1,5}", port):
        hostname = ""
    if valid_hostname(hostname) or valid_wildcard(hostname):
        return hostname
    raise NotGranted(
        f"invalid hostname: {on_one_line(name, 253)}; expected letters, digits, hyphens and dots, "
        "or *. and at least two labels"
    )


def _by_hostname(policies: Mapping) -> dict:
    """The policies, each by its hostname's normal form: under another spelling a policy would
    never be found, and its tunnel would be unprotected."""
    found = {}
    for name, policy in policies.items():
        hostname = _hostname(name)
        if policy is None:  # is that none, or one that was lost on the way?
            raise NotGranted(f"invalid policy of {hostname}: null came, expected an object")
        if hostname in found and found[hostname] != policy:
            raise NotGranted(f"two policies for {hostname}")
        found[hostname] = policy
    return found


def _check_may_claim(routes, identity):
    reasons = {hostname: identity.why_not(hostname) for hostname in routes}
    refused = [hostname for hostname, reason in reasons.items() if reason]
    if refused:
        raise NotGranted(f"not allowed: {', '.join(refused)}: {reasons[refused[0]]}")


def _port_of(target):
    """The port of a target as agents write it, "HOST:PORT"; None if there is none."""
    port = target.rpartition(":")[2]
    return int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else None
