"""The ports that visitors connect to, and the count of the visitors on each.

Port          plain HTTP: the dashboard, the redirect to https
HealthPort    plain HTTP: metrics and health
PublicPort    TLS; without TLS: HTTP, redirected to https, or raw bytes for a tcp hostname
TcpPort       one tunnel's own port, which leads to one Route
"""

import logging
import ssl
import threading
from collections.abc import Callable, Collection, Sequence
from socket import socket
from time import monotonic
from typing import Any, Protocol

from gotunnel_agent.common.duplex import OPTIONS_ARE_INHERITED, Duplex
from gotunnel_agent.common.hostnames import normal_hostname

from ..net.blocks import Blocks
from ..net.drops import BLOCKED, Dropped
from ..net.listener import Address, Listener
from ..net.shares import Seat, Shares
from ..net.total import Total
from ..routes import Registry, Route
from .arrival import SILENCE, Arrival, Challenges, PlainArrival
from .connection import HttpConnection
from .forwarded import Proxies
from .pages import NO_TEMPLATES, Templates
from .postgres import CancelKeys
from .room import Room, Timeouts
from .sites import Site
from .steps import Stepwise
from .visit import STOPPED
from .visitor import Visitor
from .visits import Visits
from .waiting import WaitingRoom

log = logging.getLogger("gotunnel.port")

# Of a HealthPort, in seconds. A peer may have a third of its places. A scrape that keeps its
# connection makes a new one each time, which costs a millisecond.
HEALTH_TIMEOUTS = Timeouts(header=2, idle=2, response=2, stall=2)


class Port:
    """A port for plain HTTP. Any thread."""

    listener: Listener  # set before the port is opened
    drains = True  # a drain waits for the visits here, and closes the port at its beginning

    def __init__(
        self,
        *,
        site: Site,
        room: Room,
        proxies: Proxies,
        timeouts: Timeouts,
        visits: Visits | None = None,
        waiting: WaitingRoom | None = None,
        templates: Templates = NO_TEMPLATES,
    ):
        """``site``: see Handler. Several ports may share a ``room``. ``proxies``: the addresses
        that stand for many visitors each. ``visits``: None if none are recorded. ``waiting``: None
        if no visit waits for its agent. ``templates``: of the operator's own error pages."""
        self.site = site
        self.room = room
        self.exchanges, self.relays, self.parting = room.exchanges, room.relays, room.parting
        self.http2 = room.http2
        self.proxies = proxies
        self.timeouts = timeouts
        self.visits = visits
        self.templates = templates
        self.waiting = waiting
        self.absent: Collection[str] = () if waiting is None else waiting.absent
        self.blocks: Blocks | None = None  # blocked addresses; None: no address can be blocked
        self.first_timeout = timeouts.header  # seconds for a visitor's first byte
        self._draining = threading.Event()
        self.is_draining = self._draining.is_set  # is_draining(): see start_draining()
        self._visitors: set[Visitor] = set()
        self._lock = threading.Lock()  # guards _visitors
        self._gone = threading.Condition(self._lock)  # notified when the last one has left
        self._said: set[str] = set()  # texts of say_once()
        self._say_lock = threading.Lock()  # guards _said

    def welcome(self, sock: socket, address: Address, seat: Seat) -> Stepwise:
        """Listener's thread: a visitor has connected."""
        visitor = self.add(sock, address, self.listener, seat)
        if address[0] in self.proxies:
            return PlainArrival(self, visitor)
        return HttpConnection(self, visitor, self.site, "http")

    def add(self, sock: socket, address: Address, listener: Listener, seat: Seat) -> Visitor:
        """Make a Visitor of a new connection, and count it. Raises Dropped if its address is
        blocked."""
        duplex = Duplex(sock, tuned=OPTIONS_ARE_INHERITED)
        duplex.stall_timeout = self.timeouts.stall
        visitor = Visitor(self, duplex, address, listener, seat)
        with self._lock:
            self._visitors.add(visitor)
        try:
            self.refuse_blocked(address[0])  # last: see cut()
        except Dropped:
            self.forget(visitor)
            raise
        return visitor

    def refuse_blocked(self, host: str) -> None:
        """Raise Dropped if an IP address is blocked."""
        if self.blocks is not None and host in self.blocks:
            raise Dropped(BLOCKED, "the operator has blocked its address")

    def cut(self, is_cut: Callable[[str], bool]) -> int:
        """Reset the connections of visitors, and the visits that a trusted proxy brings, if
        ``is_cut(address)``. Returns how many those are.

        If an address was blocked before, none is missed: a new connection is counted here before
        its address is looked for among the blocked ones."""
        with self._lock:
            visitors = list(self._visitors)
        return sum(visitor.cut(is_cut) for visitor in visitors)

    def forget(self, visitor: Visitor) -> None:
        """The visitor's connection is closed."""
        with self._lock:
            known = visitor in self._visitors
            self._visitors.discard(visitor)
            if not self._visitors:
                self._gone.notify_all()
        if known:
            visitor.seat.leave()

    def say_once(self, text: str, *arguments: object) -> None:
        """Log a warning; if it was logged before, only at debug level. Scanners cause the same ones
        again and again."""
        with self._say_lock:
            said = text in self._said
            self._said.add(text)
        log.log(logging.DEBUG if said else logging.WARNING, text, *arguments)

    def start_draining(self) -> None:
        """From now on each connection is closed after the answer to its present request."""
        self._draining.set()
        if self.http2 is not None:
            self.http2.drain()
        if self.waiting is not None:
            self.waiting.give_up()

    def await_last(self, timeout: float) -> None:
        """Wait until all visitors have been served and have left, ``timeout`` seconds at most."""
        with self._gone:
            self._gone.wait_for(lambda: not self._visitors, timeout)

    def reset(self) -> int:
        """Reset the connections that remain. Returns how many those are."""
        with self._lock:
            left = list(self._visitors)
        for visitor in left:
            visitor.fail_visit(STOPPED, 503)
            visitor.duplex.reset()
        return len(left)

    def stop(self, timeout: float) -> None:
        """End the threads that serve requests, waiting ``timeout`` seconds at most. Call it after
        reset(), and after that of all ports that share the Room."""
        if self.http2 is not None:
            self.http2.stop(timeout)
        self.exchanges.stop(timeout)


def change_ports(
    ports: Sequence[Port], idle: float, response: float, stall: float, templates: Templates
) -> None:
    """Give the ports other timeouts and error pages, for connections from now on."""
    for port in ports:
        port.templates = templates
        if port.drains:
            port.timeouts = port.timeouts._replace(idle=idle, response=response, stall=stall)


class Draining(Protocol):
    """What drain() needs of a Port, or of the visits that other gateways pass on here
    (cluster/peers.py)."""

    @property
    def drains(self) -> bool: ...

    def await_last(self, timeout: float) -> object: ...

    def reset(self) -> int: ...


def drain(ports: Sequence[Draining], timeout: float, close_parked: Callable[[], object]) -> None:
    """Wait until the visitors of all ports have been served and have left, ``timeout`` seconds at
    most; then reset their connections. ``close_parked()`` closes those that no thread has."""
    until = monotonic() + timeout
    for port in ports:
        if port.drains:
            port.await_last(max(0, until - monotonic()))
    close_parked()
    if left := sum(port.drains and port.reset() for port in ports):
        log.warning("%d visits did not end in %g s and were cut", left, timeout)


class HealthPort(Port):
    """METRICS_PORT. It is asked by programs on this machine or near it, often all from one address:
    a peer that asks nothing, or does not read, must not keep another one's place for long. It
    answers until the end of a drain, which does not wait for its peers. It records no visits."""

    drains = False

    def __init__(self, **rest: Any):
        """``rest``: see Port."""
        super().__init__(**rest | {"timeouts": HEALTH_TIMEOUTS, "visits": None})
        self.parting = Shares(0)  # each lingering close is a short one


class PublicPort(Port):
    """The port for visitors with TLS. Without TLS, HTTP is redirected to https, and any other
    protocol may be for a tcp hostname."""

    def __init__(
        self,
        *,
        context: Callable[[str | None, str | None], ssl.SSLContext],
        redirect: Site,
        registry: Registry,
        raw_host: str | None,
        challenges: Challenges,
        awaits_certificate: Callable[[str | None], bool],
        **rest: Any,
    ):
        """``context(sni, protocol)``: the context for a handshake, which accepts ``protocol`` by
        ALPN; None: the protocols that are always accepted. ``redirect``: the site for HTTP without
        TLS. ``raw_host``: the tcp hostname for visitors that name none, or None. ``challenges``:
        the proofs for TLS-ALPN-01 validations. ``awaits_certificate(hostname)``: whether it has no
        certificate yet, but will have one soon. ``rest``: see Port."""
        super().__init__(**rest)
        self.context = context
        self.redirect = redirect
        self.lookup = registry.lookup
        self.has_left_in_tcp = registry.has_left_in_tcp
        self.raw_host = raw_host
        self.cancel_keys = CancelKeys()
        self.handshakes, self.completed_handshakes = Total(), Total()
        self.challenges = challenges
        self.awaits_certificate = awaits_certificate
        self._only_tcp = registry.only_tcp
        if raw_host is not None:
            self.first_timeout = SILENCE

    def welcome(self, sock: socket, address: Address, seat: Seat) -> Stepwise:
        """Listener's thread: a visitor has connected."""
        return Arrival(self, self.add(sock, address, self.listener, seat))

    def raw_route(self, ssh: bool = False) -> Route | None:
        """The Route for a visitor without TLS, which names no hostname; None if there is none.

        SSH goes to RAW_TCP_HOST or, without that, to the only tcp hostname. Any other protocol,
        such as a database's, is not encrypted, so it goes to RAW_TCP_HOST only.
        """
        if self.raw_host is not None:
            route = self.lookup(self.raw_host)
            return route if route is not None and route.mode == "tcp" else None
        return self._only_tcp() if ssh else None


class TcpPort:
    """A tunnel's own public port, which leads to one Route. Its visitors count as those of the
    PublicPort."""

    listener: Listener  # set before the port is opened

    def __init__(self, public: PublicPort, route: Route):
        self.route = route  # of new visitors; may be replaced
        self._public = public

    def welcome(self, sock: socket, address: Address, seat: Seat) -> Stepwise:
        """Listener's thread: a visitor has connected."""
        visitor, route = self._public.add(sock, address, self.listener, seat), self.route
        if route.pool is not None:  # of one agent: the table has that of all
            route = self._public.lookup(normal_hostname(route.hostname)) or route
        return Arrival(self._public, visitor, route)

    def stop(self) -> None:
        """Close the port; visits that are running go on."""
        self.listener.stop()
