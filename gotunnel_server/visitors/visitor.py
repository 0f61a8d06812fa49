"""One visitor's connection with all that it holds, from accept to close.

    Arrival (arrival.py)  --tcp------------>  relay (relays.py)
             \\--http-->  HttpConnection (connection.py)  --101, CONNECT-->  relay

Each of these parts hands the Visitor over to the next one. The last one calls close(), which gives
back everything, so no part needs to know what an earlier part took.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from gotunnel import Ends
from gotunnel_agent.common import proxy_protocol
from gotunnel_agent.common.duplex import Duplex

from ..net.drops import ADDRESS_FULL, LEFT, PROXY_HEADER, STOPPED, Dropped
from ..net.listener import Address, Listener
from ..net.shares import Seat, Shares
from .login import Owner
from .postgres import CancelKeys
from .visit import BLOCKED, CLIENT_CLOSED, Visit
from .visit import LEFT as VISITOR_LEFT
from .visits import Visits

log = logging.getLogger("gotunnel.visitor")


class Port(Protocol):
    """What a Visitor needs of the port.Port that counts it."""

    relays: Shares
    visits: Visits | None

    def say_once(self, text: str, *arguments: object) -> None: ...

    def refuse_blocked(self, host: str) -> None: ...

    def forget(self, visitor: "Visitor") -> None: ...


class Visitor:
    """A visitor's connection. It belongs to one thread at a time."""

    __slots__ = (
        "duplex", "address", "listener", "seat", "sni", "owner", "cancel_keys", "visit",
        "fail_visits", "cut_visits", "has_asked", "has_spoken", "why_dropped", "_port",
        "_holds_relay",
    )  # fmt: skip

    def __init__(
        self, port: Port, duplex: Duplex, address: Address, listener: Listener, seat: Seat
    ):
        """``port``: the Port that counts the visitor. ``address``: the peer's, until a trusted
        proxy names the visitor's own. ``listener``: the one that accepted the connection. ``seat``:
        the connection's place among those that the listener may have."""
        self.duplex = duplex
        self.address = address
        self.listener = listener
        self.seat = seat
        self.sni: str | None = None  # the hostname in the ClientHello; None without one
        self.owner: Owner | None = None  # set if the connection may own a stream
        self.cancel_keys: CancelKeys | None = None  # set if the visitor speaks PostgreSQL
        self.visit: Visit | None = None  # the present one, if visits are recorded
        self.has_asked = False  # a visit has begun: how that ends is counted, not the connection
        self.has_spoken = False  # a byte has come
        self.why_dropped = ""  # a word of drops.REASONS; "" as long as none but LEFT is known
        # Set if the connection has several visits at a time (HTTP/2): as fail_visit(), for all
        self.fail_visits: Callable[[str, int], None] | None = None
        self.cut_visits: Callable[[Callable[[str], bool]], int] | None = None  # as cut(), for some
        self._port = port
        self._holds_relay = False  # it is counted among MAX_RELAYS

    def __str__(self) -> str:
        return f"visitor at {self.address[0]}"

    def ends(self) -> Ends:
        """Both ends of the connection, for a target that wants to know them."""
        return Ends(self.address[:2], self.duplex.local_address)

    def introduce(self, source: tuple[str, int]) -> None:
        """A trusted proxy's PROXY header names ``source`` (IP address, port) as the visitor's.
        Raises Dropped if that address is blocked, or has no share of connections left."""
        self.address = source
        self._port.refuse_blocked(source[0])
        if not self.seat.move(source[0]):
            raise Dropped(ADDRESS_FULL, "its address has too many connections already")

    def begin_visit(self) -> Visit | None:
        """The visitor has asked for something: begin a Visit, if visits are recorded."""
        self.has_asked = True
        if self._port.visits is not None:
            self.visit = self._port.visits.begin(self.address[0])
        return self.visit

    def fail_visit(self, error: str, status: int) -> None:
        """As Visit.fail(), if there is one."""
        if self.fail_visits is not None:
            self.fail_visits(error, status)
        visit = self.visit  # another thread may end it meanwhile
        if visit is not None:
            visit.fail(error, status)

    def cut(self, is_cut: Callable[[str], bool]) -> int:
        """Reset the connection if ``is_cut(address)`` of its visitor, or those of its visits that
        are from such an address, as a trusted proxy says. Returns how many that were. Any thread.
        """
        visit = self.visit
        if is_cut(self.address[0]) or visit is not None and is_cut(visit.visitor):
            self.fail_visit(BLOCKED, CLIENT_CLOSED)
            self.duplex.reset()
            return 1
        return 0 if self.cut_visits is None else self.cut_visits(is_cut)

    def end_visit(self) -> None:
        """As Visit.end(), if there is one."""
        if self.visit is not None:
            self.visit.end()
            self.visit = None

    def claim_relay(self) -> bool:
        """Count the connection as a relay; False if there is no room for another one."""
        self._holds_relay = self._port.relays.enter(self.address[0])
        if not self._holds_relay:
            self.refuse_relay()
        self.seat.settle()
        return self._holds_relay

    @property
    def relays(self) -> Shares:
        """The places of relays."""
        return self._port.relays

    def refuse_relay(self) -> None:
        """Log that there is no place for one."""
        log.warning("%s refused: too many relays are running (at most %d in all, and a share "
                    "of them for each address)", self, self._port.relays.most)  # fmt: skip

    def refuse_introduction(self, data: bytes) -> None:
        """Raise Dropped if ``data``, the first bytes, begin a PROXY header. Only a
        trusted proxy may name another address as the visitor's, and only once."""
        if proxy_protocol.begins(data):
            self._port.say_once("%s dropped: it sent a PROXY header, but TRUSTED_PROXIES does not "
                                "name it", self)  # fmt: skip
            raise Dropped(PROXY_HEADER, "a PROXY header from an untrusted address")

    def close(self) -> None:
        """Close the connection and give back all that it holds. Only for the part that has it."""
        self.duplex.close()
        self.fail_visit(VISITOR_LEFT, CLIENT_CLOSED)  # unless it has ended as it should
        self.end_visit()
        if self.owner is not None:
            self.owner.close()
        if self._holds_relay:
            self._holds_relay = False
            self._port.relays.leave(self.address[0])
        if not self.has_asked:
            self.has_asked = True  # counted once
            stopping = self.listener.stopping
            self.listener.drops.add(self.why_dropped or (STOPPED if stopping else LEFT))
        self._port.forget(self)
