"""Which tunnel serves a hostname. Visitors and agents meet here, and import nothing else of each
other."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from gotunnel import Ends, Stream
from gotunnel_agent.common.hostnames import WILDCARD, normal_hostname

# Hostnames in tcp mode that are remembered when their agents have left, some 400 bytes each.
MOST_LEFT = 4096


class HostnameTaken(Exception):
    """Hostnames cannot be claimed. ``tunnels`` are the ones that serve them; there is none if the
    hostnames are the gateway's own."""

    def __init__(self, text, tunnels=()):
        super().__init__(text)
        self.tunnels = tunnels


class AgentBusy(OSError):
    """A visit cannot begin: its agent has as many streams or visits as its credential permits.
    The text says which, and how many."""


class Tunnel(Protocol):
    """What visits need of the tunnel that serves their Route. agents/tunnel.py implements it, and
    says what each method does."""

    agent: Any  # a registration.Agent, for the agents' wing and the hall, which know the type
    half_close: bool  # the agent can pass a visitor's half-close on to its target
    upgrades: bool  # ... also in http mode, on a stream opened with ``relayed``

    def open(
        self, route: Route, ends: Callable[[], Ends], first: bytes = b"", relayed: bool = False
    ) -> Stream: ...

    def count_failed(self, route: Route) -> None: ...

    def take_kept(self, route: Route) -> Stream | None: ...

    def keep(self, route: Route, stream: Stream) -> None: ...

    def make_way(self, route: Route) -> None: ...

    def give_up_kept(self, route: Route, waiting: Stream) -> None: ...

    def served(self, route: Route, stream: Stream) -> None: ...

    def take_own(self, route: Route, owner: object) -> Stream | None: ...

    def keep_own(self, route: Route, owner: object, stream: Stream) -> None: ...

    def drop_own(self, owner: object) -> None: ...

    def tell_certificate(self, hostname: str) -> None: ...


class Policy(Protocol):
    """What visits need of a policy.Policy. Its verdicts are those of visitors/verdict.py, which
    this module must not import: so Any."""

    def judge_request(self, address: str, authorization: str | None) -> Any: ...

    def judge_connection(self, address: str) -> Any: ...


class Route(NamedTuple):
    """What a hostname leads to.

    ``hostname`` is spelled as the agent registered it: Go agents look it up as it stands.
    ``mode`` is "http" or "tcp". ``tunnel`` is a tunnel.Tunnel, None until one is made.
    ``host_header`` is the Host that the target gets, None for the visitor's. ``addressed``: the
    agent wants to hear the visitor's address. ``target_port`` is the target's, ``port`` the public
    one that was opened for it; None if there is none. ``policy`` is what visitors must comply with,
    a policy.Policy; None: all are welcome.
    """

    hostname: str
    mode: str
    tunnel: Tunnel
    host_header: str | None = None
    addressed: bool = False
    target_port: int | None = None
    port: int | None = None
    policy: Policy | None = None


class Registry:
    """Hostnames to routes. Any thread; no I/O.

    A wildcard, such as ``*.dev.example.com``, is a hostname, and stands for all that end in
    ``.dev.example.com`` and have no route, nor a longer wildcard, of their own.
    """

    def __init__(self, reserved=()):
        """``reserved`` hostnames are the gateway's own: no tunnel can have them."""
        self._reserved = frozenset(map(normal_hostname, reserved))
        self._lock = threading.Lock()  # held to replace _table
        # (hostname to Route, whether a wildcard is among them). Neither the tuple nor the dict is
        # changed once it stands here, so that readers need no lock, and see both of one state.
        self._table = ({}, False)
        self._left_tcp = OrderedDict()  # hostnames in tcp mode that are not served any more: None

    def claim(self, routes, permit=lambda routes: None, instead_of=()):
        """Take every hostname of ``routes`` (hostname to Route), or none of them; those of the
        tunnels ``instead_of`` are free to take.

        ``permit(routes)`` is called with all that there would be then, and may raise. Raises
        HostnameTaken, naming those that are reserved, or else those that are served.
        """
        with self._lock:
            if own := [hostname for hostname in routes if hostname in self._reserved]:
                names = ", ".join(own)
                raise HostnameTaken(f"not allowed: {names}: reserved for the gateway itself")
            held = {
                hostname: route for hostname, route in self._table[0].items()
                if route.tunnel not in instead_of
            } if instead_of else self._table[0]  # fmt: skip
            if taken := [hostname for hostname in routes if hostname in held]:
                tunnels = {held[hostname].tunnel for hostname in taken}
                raise HostnameTaken(f"host already registered: {', '.join(taken)}", tunnels)
            routes = {**held, **routes}
            permit(routes)
            self._put(routes)
            for hostname in routes:
                self._left_tcp.pop(hostname, None)

    def _put(self, routes):
        """Caller holds the lock, and changes ``routes`` no more."""
        self._table = (routes, any(hostname.startswith(WILDCARD) for hostname in routes))

    def update(self, routes):
        """Put ``routes``, claimed before and still held, in the place of what they were."""
        with self._lock:
            held, _ = self._table
            still = {
                hostname: route for hostname, route in routes.items()
                if hostname in held and held[hostname].tunnel is route.tunnel
            }  # fmt: skip
            self._put({**held, **still})

    def release(self, tunnel):
        """Give back all hostnames that ``tunnel`` has claimed."""
        with self._lock:
            held, _ = self._table
            self._put({
                hostname: route
                for hostname, route in held.items()
                if route.tunnel is not tunnel
            })  # fmt: skip
            for hostname, route in held.items():
                if route.tunnel is tunnel and route.mode == "tcp":
                    self._left_tcp[hostname] = None
                    if len(self._left_tcp) > MOST_LEFT:
                        self._left_tcp.popitem(last=False)

    def only_tcp(self):
        """The one Route in tcp mode; None if there is none, or more than one."""
        routes = [route for route in self._table[0].values() if route.mode == "tcp"]
        return routes[0] if len(routes) == 1 else None

    def lookup(self, hostname):
        """The Route of a hostname (lower case, no port, no trailing dot), or None."""
        routes, wildcards = self._table
        route = routes.get(hostname)
        if route is None and wildcards and hostname not in self._reserved:
            return next(filter(None, map(routes.get, _wildcards(hostname))), None)
        return route

    def has_left_in_tcp(self, hostname) -> bool:
        """Whether a hostname that has no Route was in tcp mode when it had one."""
        left = self._left_tcp
        if hostname in self._reserved or not left:
            return False
        return hostname in left or any(name in left for name in _wildcards(hostname))

    def routes(self) -> dict:
        """All there are, hostname to Route, as they are now."""
        return dict(self._table[0])


def _wildcards(hostname):
    """Those that stand for a hostname, the longest first."""
    while "." in hostname:
        hostname = hostname.partition(".")[2]
        yield WILDCARD + hostname
