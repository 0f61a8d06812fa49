"""A public port: the visitors on it, and what they need.

Port          plain HTTP: the dashboard, the redirect to https
PublicPort    TLS, HTTP to be redirected, raw bytes for a tcp hostname (arrival.py)
TcpPort       one tunnel's own, which leads to one Route
"""

import logging
import threading
from typing import NamedTuple

from gotunnel_agent.common.duplex import STALL_TIMEOUT, Duplex
from gotunnel_agent.common.process import Workers

from ..net.shares import Shares
from . import relays
from .arrival import SILENCE, Arrival, PlainArrival
from .connection import MAX_PARTING, HttpConnection
from .postgres import CancelKeys
from .visitor import Visitor

log = logging.getLogger("gotunnel.port")


class Timeouts(NamedTuple):
    """Seconds. ``header``: for a request's head, a ClientHello, a handshake. ``idle``: between two
    requests, and for a visitor that sends nothing of a request's body. ``response``: from the whole
    request to the first byte of the target's answer. ``stall``: for a visitor that reads
    nothing."""

    header: float
    idle: float
    response: float
    stall: float = STALL_TIMEOUT


class Exchanges:
    """The threads that serve requests, and the room for so many at a time."""

    def __init__(self, most, proxies):
        self.room = Shares(most, proxies)
        self._workers = Workers(most, "exchange")
        self.start = self._workers.submit  # start(function)
        self.stop = self._workers.shutdown  # stop(timeout)


class Room:
    """What the visitors of one port, or of several, may have at a time."""

    def __init__(self, requests, proxies):
        """``requests``: how many are answered at a time. ``proxies``: see Port."""
        self.exchanges = Exchanges(requests, proxies)
        self.relays = Shares(relays.MAX_RELAYS, proxies)
        self.parting = Shares(MAX_PARTING, proxies)  # visitors that still send after their answer


class Port:
    """A port for plain HTTP. Any thread."""

    def __init__(self, *, site, room, proxies, timeouts):
        """``site``: see Handler. ``room``: a Room, which another port may share. ``proxies``: the
        addresses that stand for many visitors, a forwarded.Proxies. ``timeouts``: Timeouts."""
        self.listener = None  # set before it is started
        self.site = site
        self.room = room
        self.exchanges, self.relays, self.parting = room.exchanges, room.relays, room.parting
        self.proxies = proxies
        self.timeouts = timeouts
        self.first_timeout = timeouts.header  # seconds for a visitor's first byte
        self._draining = threading.Event()
        self.is_draining = self._draining.is_set  # is_draining(): see start_draining()
        self._visitors = set()
        self._gone = threading.Condition()  # guards _visitors; notified when it shrinks
        self._said = set()  # texts of say_once()
        self._say_lock = threading.Lock()  # guards _said

    def welcome(self, sock, address, seat):
        """Listener's thread: a visitor has connected."""
        visitor = self.add(sock, address, self.listener, seat)
        if address[0] in self.proxies:
            return PlainArrival(self, visitor)
        return HttpConnection(self, visitor, self.site, "http")

    def add(self, sock, address, listener, seat) -> Visitor:
        """Count the connection as one of a visitor's."""
        duplex = Duplex(sock)
        duplex.stall_timeout = self.timeouts.stall
        visitor = Visitor(self, duplex, address, listener, seat)
        with self._gone:
            self._visitors.add(visitor)
        return visitor

    def forget(self, visitor):
        """The visitor's connection is closed."""
        with self._gone:
            known = visitor in self._visitors
            self._visitors.discard(visitor)
            self._gone.notify_all()
        if known:
            visitor.seat.leave()

    def say_once(self, text, *arguments):
        """Warn of something that the operator has to hear once, and not each time that a scanner
        comes by."""
        with self._say_lock:
            said = text in self._said
            self._said.add(text)
        log.log(logging.DEBUG if said else logging.WARNING, text, *arguments)

    def start_draining(self):
        """From now on a connection is closed as soon as its request is answered."""
        self._draining.set()

    def drain(self, timeout) -> int:
        """Wait until the visitors that are being served have gone; after ``timeout`` seconds,
        break the connections that are left. Returns how many."""
        self.start_draining()
        with self._gone:
            self._gone.wait_for(lambda: not self._visitors, timeout)
            left = list(self._visitors)
        for visitor in left:
            visitor.duplex.reset()
        return len(left)

    def stop(self, timeout):
        """End the threads that serve requests; after drain(), that of the ports that share its Room
        included. Waits ``timeout`` seconds at most."""
        self.exchanges.stop(timeout)


class PublicPort(Port):
    """The port for visitors with TLS. A visitor that speaks HTTP without it is sent to https; one
    that speaks anything else may be for a tcp hostname."""

    def __init__(
        self, *, context, redirect, registry, raw_host, challenges, awaits_certificate, **rest
    ):
        """``context(sni, protocol)``: the SSLContext of a handshake, which takes that protocol by
        ALPN, None for the ones that it always takes. ``redirect``: the ``site`` of
        visitors without TLS. ``registry`` knows the Routes. ``raw_host``: the tcp hostname of
        visitors that name none, or None. ``challenges``: what a CA may find here.
        ``awaits_certificate(hostname)``: it has none yet, and will soon. ``rest``: see Port."""
        super().__init__(**rest)
        self.context = context
        self.redirect = redirect
        self.lookup = registry.lookup
        self.has_left_in_tcp = registry.has_left_in_tcp
        self.raw_host = raw_host
        self.cancel_keys = CancelKeys()
        self.challenges = challenges
        self.awaits_certificate = awaits_certificate
        self._only_tcp = registry.only_tcp
        if raw_host is not None:
            self.first_timeout = SILENCE

    def welcome(self, sock, address, seat):
        """Listener's thread: a visitor has connected."""
        return Arrival(self, self.add(sock, address, self.listener, seat))

    def raw_route(self, ssh=False):
        """The Route of a visitor that names no hostname, None if there is none for it.

        An SSH client is for the only tcp hostname, if there is just one. Any other protocol, such
        as a database's, is passed on without encryption only to the hostname in RAW_TCP_HOST.
        """
        if self.raw_host is not None:
            route = self.lookup(self.raw_host)
            return route if route is not None and route.mode == "tcp" else None
        return self._only_tcp() if ssh else None


class TcpPort:
    """A public port of its own for one tunnel, which leads to one Route. Its visitors count as
    those of the PublicPort."""

    def __init__(self, public, route):
        self.listener = None  # set before it is started
        self.route = route  # of those that come; may be replaced
        self._public = public

    def welcome(self, sock, address, seat):
        """Listener's thread: a visitor has connected."""
        visitor = self._public.add(sock, address, self.listener, seat)
        return Arrival(self._public, visitor, self.route)

    def stop(self):
        """Close the port; visits that run go on."""
        self.listener.stop()
