"""One visitor's connection, from accept to close, whichever part has it at the moment.

    Arrival (arrival.py)  --tcp------------>  relay (relays.py)
             \\--http-->  HttpConnection (connection.py)  --101, CONNECT-->  relay

Each part hands the Visitor over to the next one, and forgets it. Its close() gives back what the
connection holds, so no part needs to know what an earlier one took.
"""

import logging

from gotunnel import Ends
from gotunnel_agent.common import proxy_protocol

log = logging.getLogger("gotunnel.visitor")


class Visitor:
    """What the gateway knows of a connection. It belongs to one thread at a time."""

    __slots__ = (
        "duplex", "address", "listener", "seat", "sni", "owner", "cancel_keys", "_port",
        "_holds_relay",
    )  # fmt: skip

    def __init__(self, port, duplex, address, listener, seat):
        """``port``: the Port that counts it. ``address`` is the peer's, or the one that a trusted
        proxy has told. ``listener``: that of the port which it has connected to; ``seat``: its
        place there."""
        self.duplex = duplex
        self.address = address
        self.listener = listener
        self.seat = seat
        self.sni = None  # hostname in the ClientHello; None: none, or no TLS
        self.owner = None  # a login.Owner, if the connection may own a stream
        self.cancel_keys = None  # postgres.CancelKeys, if it speaks PostgreSQL
        self._port = port
        self._holds_relay = False  # it is one of MAX_RELAYS

    def __str__(self):
        return f"visitor at {self.address[0]}"

    def ends(self) -> Ends:
        """Both ends of the connection, for a target that wants to know."""
        return Ends(self.address[:2], self.duplex.local_address)

    def introduce(self, source):
        """A trusted proxy says that the visitor is at ``source``, a (IP address, port). Raises
        ConnectionAbortedError if that address has as many connections as it may."""
        self.address = source
        if not self.seat.move(source[0]):
            raise ConnectionAbortedError("no place for another connection of its address")

    def claim_relay(self) -> bool:
        """Whether the connection may become a relay; it counts as one from here on."""
        relays = self._port.relays
        self._holds_relay = relays.enter(self.address[0])
        if not self._holds_relay:
            log.warning("%s refused, too many relays are running (%d at most, of which an address "
                        "has a part)", self, relays.most)  # fmt: skip
        self.seat.settle()
        return self._holds_relay

    def refuse_introduction(self, data):
        """Raise ConnectionAbortedError if ``data``, the first bytes, begin a PROXY header. Only a
        trusted proxy may say where its visitor comes from, and only once."""
        if proxy_protocol.begins(data):
            self._port.say_once("%s dropped: it sent a PROXY header, and TRUSTED_PROXIES does not "
                                "name it", self)  # fmt: skip
            raise ConnectionAbortedError("a PROXY header")

    def close(self):
        """Close the connection and give back what it holds. Only for the part that has it."""
        self.duplex.close()
        if self.owner is not None:
            self.owner.close()
        if self._holds_relay:
            self._holds_relay = False
            self._port.relays.leave(self.address[0])
        self._port.forget(self)
