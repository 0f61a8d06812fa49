"""The routing table: which tunnel serves a hostname. Visitors and agents meet here, and import
nothing else of each other."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from gotunnel import Ends, Stream
from gotunnel_agent.common.hostnames import WILDCARD, normal_hostname
from gotunnel_agent.common.one_line import some

# Remembered hostnames whose agents have left, some 400 bytes each.
MOST_LEFT = 4096
# Seconds after its agent has left in which a hostname is awaited: a drain of 5 s, a restart, and
# the dial. Later it is more likely to be gone for good, and its visitors get their page at once.
ABSENCE = 15


# HTTP/2 of a target: without TLS, by prior knowledge (RFC 9113 §3.3); or with TLS, which its agent
# speaks.
H2C, H2 = "h2c", "h2"


class HostnameTaken(Exception):
    """Hostnames cannot be claimed. ``holders``: the tunnel that has each of them, or None if they
    are the gateway's own. The tunnels' type is Any here: only the agents' wing uses them, and knows
    their type."""

    def __init__(self, holders: Mapping[str, Any], why: Mapping[str, str] = MappingProxyType({})):
        """``why`` has more to say of some hostnames: in what a pool differs."""
        names = some(f"{name}, {why[name]}" if name in why else name for name in holders)
        own = None in holders.values()
        super().__init__(
            f"not allowed: {names}: reserved for the gateway itself"
            if own
            else f"host already registered: {names}"
        )
        self.holders = holders
        self.why = why
        self.tunnels = frozenset() if own else frozenset(holders.values())

    def one_by_one(self) -> dict[str, str]:
        """The text for each of the hostnames alone."""
        return {
            hostname: str(HostnameTaken({hostname: holder}, self.why))
            for hostname, holder in self.holders.items()
        }

    def of(self, holder: Any) -> HostnameTaken:
        """The part of it that is about one of the tunnels."""
        held = {hostname: each for hostname, each in self.holders.items() if each is holder}
        return HostnameTaken(held, self.why)


class Undecided(Exception):
    """It is not known yet whether these hostnames can be claimed: other gateways decide it, too.
    The text says what is awaited."""

    def __init__(self, hostnames: Collection[str], reason: str):
        super().__init__(reason)
        self.hostnames = tuple(hostnames)


class NotDecided(HostnameTaken):
    """A claim was Undecided for too long."""

    def __init__(self, undecided: Undecided):
        super().__init__(dict.fromkeys(undecided.hostnames))
        self._reason = str(undecided)

    def __str__(self) -> str:
        return f"cannot be decided now: {some(self.holders)}: {self._reason}; try again"

    def one_by_one(self) -> dict[str, str]:
        return {
            hostname: f"cannot be decided now: {hostname}: {self._reason}; try again"
            for hostname in self.holders
        }


class AgentBusy(OSError):
    """A visit cannot begin: its agent has as many streams or visits as its credential permits.
    The text says which, and how many."""


class Tunnel(Protocol):
    """What visits need of the tunnel that serves their Route. agents/tunnel.py implements it, and
    says what each method does."""

    agent: Any  # a registration.Agent, for the agents' wing and the hall, which know the type
    half_close: bool  # the agent can pass a visitor's half-close on to its target
    upgrades: bool  # ... also in http mode, on a stream opened with ``relayed``
    # Why it may refuse a visit, a common/refusals.Refusal by code: other codes mean nothing
    refusals: Mapping[int, Any]
    # Why targets are not well, by Route.hostname. Nearly always empty; replaced whole.
    unwell: Mapping[str, str]

    @property
    def round_trip(self) -> float | None: ...

    @property
    def heard_at(self) -> float: ...

    def ask(self) -> float: ...

    def well(self, hostname: str) -> bool: ...

    def open(
        self, route: Route, ends: Callable[[], Ends], first: bytes = b"", relayed: bool = False,
        timeout: float = 10,
    ) -> Stream: ...  # fmt: skip

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

    def spent(self) -> dict[str, dict[Hashable, int]]: ...

    def hear(self, bucket: str, share: Hashable, tokens: int) -> None: ...


class Member(Protocol):
    """One of the agents of a Pool."""

    route: Route  # of this agent alone; its ``pool`` is None
    token: str  # names the agent in a visitor's cookie; it can be neither guessed nor read back
    weight: int
    visits: int  # that it has now

    @property
    def is_ready(self) -> bool: ...

    @property
    def state(self) -> str: ...


class Pool(Protocol):
    """What visits and the Registry need of a pool.Pool: the agents that share a hostname. Any
    thread. agents/pool.py implements it, and says how a member is chosen."""

    owner: str  # of the hostname's claim: the same for all agents that may join
    sticky: str  # COOKIE or ADDRESS, "" if any member will do for a visit

    @property
    def members(self) -> Sequence[Member]: ...

    def well(self) -> bool: ...

    def key(self, address: str, token: str = "") -> str: ...

    def choose(
        self, key: str = "", but: Collection[Member] = (), bound: Tunnel | None = None
    ) -> Member | None: ...

    def leave(self, member: Any) -> None: ...

    def refused(self, member: Any) -> None: ...

    def reached(self, member: Any) -> None: ...

    def silent(self, member: Any) -> None: ...

    def update(self, route: Route) -> Route | None: ...

    def in_the_way(self, newcomer: Any) -> tuple[Any, str] | None: ...

    def joined(self, there: Route, newcomer: Any) -> Route: ...

    def without(self, there: Route, tunnels: Collection[Tunnel]) -> Route | None: ...


COOKIE, ADDRESS = "cookie", "address"  # by what a visitor keeps its member of a Pool


class Route(NamedTuple):
    """Where visits of a hostname go, and how.

    ``hostname`` is spelled as the agent registered it: Go agents look it up as it stands.
    ``mode`` is "http" or "tcp". ``host_header`` is the Host that the target gets, None for the
    visitor's. ``addressed``: the agent wants the visitor's address. ``target_port`` is the
    target's, ``port`` the public one that was opened for it; None if there is none. ``policy``
    decides which visitors are let in; None: all. ``protocol`` is what the target speaks in http
    mode: H2C or H2 for HTTP/2, "" for HTTP/1.1. ``target`` is what the agent calls its target: any
    text, which is only shown. ``pool``: the agents that share the hostname, of which ``tunnel`` and
    all that belongs to it are the first one's; None if one agent has the hostname alone.
    """

    hostname: str
    mode: str
    tunnel: Tunnel
    host_header: str | None = None
    addressed: bool = False
    target_port: int | None = None
    port: int | None = None
    policy: Policy | None = None
    protocol: str = ""
    target: str = ""
    pool: Pool | None = None

    def tunnels(self) -> list[Tunnel]:
        """The tunnels that serve the hostname: one, or those of the pool."""
        if self.pool is None:
            return [self.tunnel]
        return [member.route.tunnel for member in self.pool.members]

    def is_unwell(self) -> bool:
        """Whether its visits are held back (health checks): its agent has found the target unwell,
        and so has each other agent of its pool."""
        return self.hostname in self.tunnel.unwell and (self.pool is None or not self.pool.well())

    def in_the_way(self, newcomer: Route) -> tuple[Tunnel, str] | None:
        """The tunnel because of which a newcomer cannot have the hostname, too, and what to say of
        it ("": no more than that it has the hostname); None if the newcomer joins a pool."""
        if self.pool is None or newcomer.pool is None:
            return self.tunnel, ""
        return self.pool.in_the_way(newcomer.pool)


class Registry:
    """Hostnames to routes. Any thread; no I/O.

    A wildcard, such as ``*.dev.example.com``, is a hostname. It stands for all hostnames that end
    in ``.dev.example.com`` and have neither a route nor a longer wildcard of their own.
    """

    def __init__(self, reserved: Iterable[str] = ()):
        """``reserved`` hostnames are the gateway's own: no tunnel can have them."""
        self._reserved = frozenset(map(normal_hostname, reserved))
        self._lock = threading.Lock()  # held to replace _table
        # Routes by hostname, and whether a wildcard is among them. Replaced whole and never changed
        # (copy on write), so that readers take no lock and see both of one state. It joins the two
        # below it: the routes of agents here, which win, and those of other gateways' agents.
        self._table: tuple[dict[str, Route], bool] = ({}, False)
        self._held: dict[str, Route] = {}
        self._withheld: frozenset[str] = frozenset()  # of these, those that are not served now
        self._served: dict[str, Route] = {}  # the others
        self._elsewhere: dict[str, Route] = {}
        # Hostnames in tcp mode that are no longer served; the latest last.
        self._left_tcp: OrderedDict[str, None] = OrderedDict()
        # Awaited hostnames, and until when (monotonic); the latest last. Other modules read only
        # whether it is empty, as it nearly always is.
        self.absent: OrderedDict[str, float] = OrderedDict()
        self.on_claim: Callable[[], object] = lambda: None  # called when hostnames were claimed
        # Called when routes of agents here have changed. Not under the lock; it must not wait.
        self.on_change: Callable[[], object] = lambda: None
        # Called with hostnames that no tunnel has any more.
        self.on_free: Callable[[Collection[str]], object] = lambda hostnames: None

    def claim(
        self,
        routes: Mapping[str, Route],
        permit: Callable[[Mapping[str, Route]], object] = lambda routes: None,
        instead_of: Collection[Tunnel] = (),
    ) -> None:
        """Take every hostname of ``routes``, or none of them. Hostnames of the tunnels
        ``instead_of`` count as free. A route with a pool joins the pool that has its hostname.

        ``permit(routes)`` gets all routes that there would be then, and may raise. Raises
        HostnameTaken, which names the reserved hostnames, or else those that are taken.
        """
        with self._lock:
            before = self._held
            routes = self._checked(routes, permit, instead_of)
            self._put(routes)
            for hostname in routes:
                self._left_tcp.pop(hostname, None)
                self.absent.pop(hostname, None)
        self.on_change()
        self.on_claim()
        if instead_of and (freed := before.keys() - routes.keys()):
            self.on_free(freed)

    def give_up(self, tunnel: Tunnel, hostnames: Collection[str]) -> None:
        """See agents.claims.Claims: nothing is left to be decided here."""

    def check(
        self,
        routes: Mapping[str, Route],
        permit: Callable[[Mapping[str, Route]], object],
        instead_of: Collection[Tunnel],
    ) -> None:
        """Raise what claim() would raise now."""
        with self._lock:
            self._checked(routes, permit, instead_of)

    def _checked(
        self,
        routes: Mapping[str, Route],
        permit: Callable[[Mapping[str, Route]], object],
        instead_of: Collection[Tunnel],
    ) -> dict[str, Route]:
        """All routes of agents here as they are with ``routes``. Caller holds the lock."""
        if own := [hostname for hostname in routes if hostname in self._reserved]:
            raise HostnameTaken(dict.fromkeys(own))
        held = _without(self._held, instead_of) if instead_of else self._held
        found = {**held, **_joined(held, routes)}
        permit(found)
        return found

    def _put(self, held: dict[str, Route]) -> None:
        """Caller holds the lock, and does not change ``held`` afterwards."""
        self._held = held
        self._join()

    def _join(self) -> None:
        """Caller holds the lock."""
        self._served = held = self._held
        if self._withheld:
            self._served = held = {n: r for n, r in held.items() if n not in self._withheld}
        routes = {**self._elsewhere, **held} if self._elsewhere else held
        self._table = (routes, any(hostname.startswith(WILDCARD) for hostname in routes))

    def put_elsewhere(self, routes: Mapping[str, Route]) -> None:
        """Replace all routes to agents of other gateways (cluster/peers.py). Nothing claims them:
        the route of an agent here wins, and serves from the moment that it is claimed."""
        with self._lock:
            before = self._elsewhere
            self._elsewhere = {
                hostname: route for hostname, route in routes.items()
                if hostname not in self._reserved
            }  # fmt: skip
            self._join()
            for hostname, route in before.items():
                if hostname not in self._table[0]:
                    self._await(hostname, route.mode)
            for hostname in self._elsewhere.keys() - before.keys():
                self._left_tcp.pop(hostname, None)
                self.absent.pop(hostname, None)
        self.on_claim()

    def withhold(self, hostnames: Collection[str]) -> None:
        """Do not serve these hostnames of agents here, and serve all others again: another gateway
        may serve them. They stay claimed."""
        withheld = frozenset(hostnames)
        with self._lock:
            before, self._withheld = self._withheld, withheld
            if before == withheld:
                return
            self._join()
            for hostname in withheld - before:
                if hostname in self._held and hostname not in self._table[0]:
                    self._await(hostname, self._held[hostname].mode)
            for hostname in before - withheld:
                self._left_tcp.pop(hostname, None)
                self.absent.pop(hostname, None)
        self.on_change()
        self.on_claim()

    def update(self, routes: Mapping[str, Route]) -> None:
        """Replace routes of hostnames. Those that their tunnel no longer holds are left out."""
        with self._lock:
            held = self._held
            still = {}
            for hostname, route in routes.items():
                there = held.get(hostname)
                if there is not None and there.pool is not None:
                    if (updated := there.pool.update(route)) is not None:
                        still[hostname] = there._replace(port=updated.port or there.port)
                elif there is not None and there.tunnel is route.tunnel:
                    still[hostname] = route
            self._put({**held, **still})
        self.on_change()

    def release(self, tunnel: Tunnel) -> None:
        """Give back all hostnames that ``tunnel`` has claimed."""
        with self._lock:
            held = self._held
            left = _without(held, (tunnel,))
            self._put(left)
            freed = {name: route for name, route in held.items() if name not in left}
            for hostname, route in freed.items():
                if hostname not in self._table[0]:
                    self._await(hostname, route.mode)
        self.on_change()
        if freed:
            self.on_free(freed)

    def expect(self, modes: Mapping[str, str]) -> None:
        """Await hostnames, as if their agents had left just now: the gateway before served them.
        ``modes``: mode by hostname."""
        with self._lock:
            for hostname, mode in modes.items():
                if hostname not in self._table[0] and hostname not in self._reserved:
                    self._await(hostname, mode)

    def _await(self, hostname: str, mode: str) -> None:
        """Note that a hostname has lost its route just now. Caller holds the lock."""
        self.absent.pop(hostname, None)
        self.absent[hostname] = monotonic() + ABSENCE
        if len(self.absent) > MOST_LEFT:
            self.absent.popitem(last=False)
        if mode == "tcp":
            self._left_tcp[hostname] = None
            if len(self._left_tcp) > MOST_LEFT:
                self._left_tcp.popitem(last=False)

    def modes(self) -> dict[str, str]:
        """The mode of each hostname that is served, or awaited."""
        now = monotonic()
        with self._lock:
            awaited = [hostname for hostname, until in self.absent.items() if until > now]
            modes = {name: "tcp" if name in self._left_tcp else "http" for name in awaited}
            return modes | {name: route.mode for name, route in self._table[0].items()}

    def awaits(self, hostname: str) -> bool:
        """Whether a hostname has no route, but had one less than ABSENCE seconds ago."""
        if not self.absent or hostname in self._reserved or self.lookup(hostname) is not None:
            return False
        now = monotonic()
        with self._lock:
            while self.absent and next(iter(self.absent.values())) <= now:
                self.absent.popitem(last=False)
            return hostname in self.absent or any(n in self.absent for n in _wildcards(hostname))

    def holders(self, hostname: str) -> list[Tunnel]:
        """The tunnels here that have exactly this hostname, or wildcard: none, one or a pool."""
        route = self._held.get(hostname)
        return [] if route is None else route.tunnels()

    @property
    def table(self) -> Mapping[str, Route]:
        """All routes by hostname, those of wildcards too. It never changes: after a change, this is
        another mapping."""
        return self._table[0]

    def only_tcp(self) -> Route | None:
        """The one Route in tcp mode; None if there is none, or more than one."""
        routes = [route for route in self._table[0].values() if route.mode == "tcp"]
        return routes[0] if len(routes) == 1 else None

    def lookup(self, hostname: str) -> Route | None:
        """The Route of a hostname (lower case, no port, no trailing dot), or None."""
        routes, wildcards = self._table
        route = routes.get(hostname)
        if route is None and wildcards and hostname not in self._reserved:
            return next(filter(None, map(routes.get, _wildcards(hostname))), None)
        return route

    def has_left_in_tcp(self, hostname: str) -> bool:
        """Whether a hostname without a Route was in tcp mode when it had one."""
        left = self._left_tcp
        if hostname in self._reserved or not left:
            return False
        return hostname in left or any(name in left for name in _wildcards(hostname))

    def routes(self) -> dict[str, Route]:
        """All routes by hostname, as they are now."""
        return dict(self._table[0])

    def held(self) -> Mapping[str, Route]:
        """The routes of agents here that are served, by hostname, as they are now; it never
        changes."""
        return self._served


def _without(held: Mapping[str, Route], tunnels: Collection[Tunnel]) -> dict[str, Route]:
    """The routes that are left without these tunnels."""
    left = {}
    for hostname, route in held.items():
        if route.pool is not None:
            rest = route.pool.without(route, tunnels)
            if rest is not None:
                left[hostname] = rest
        elif route.tunnel not in tunnels:
            left[hostname] = route
    return left


def _joined(held: Mapping[str, Route], routes: Mapping[str, Route]) -> dict[str, Route]:
    """The routes as they are beside the held ones: alone, or in a pool. Raises HostnameTaken."""
    taken, why, found = {}, {}, {}
    for hostname, route in routes.items():
        there = held.get(hostname)
        if there is None:
            found[hostname] = route
        elif (obstacle := there.in_the_way(route)) is not None:
            taken[hostname], reason = obstacle
            if reason:
                why[hostname] = reason
        elif there.pool is not None:
            found[hostname] = there.pool.joined(there, route.pool)
    if taken:
        raise HostnameTaken(taken, why)
    return found


def _wildcards(hostname: str) -> Iterator[str]:
    """The wildcards that stand for a hostname, the longest first."""
    while "." in hostname:
        hostname = hostname.partition(".")[2]
        yield WILDCARD + hostname
