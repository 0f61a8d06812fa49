"""One gateway as a member of several: composes the parts of this wing, and starts and stops them.

It is loaded only where CLUSTER or PROCESSES is set (membership.py in the hall).
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Callable, Mapping
from time import time
from typing import Any, Protocol

from gotunnel import __version__

from ..routes import Registry
from .board import Board, Card, Message

log = logging.getLogger("gotunnel.cluster")


class Settings(Protocol):
    """What a cluster needs of config.Config."""

    @property
    def tunnel_port(self) -> int: ...


class Child(Protocol):
    """What a cluster needs of processes.child.Child: one of the processes of PROCESSES."""

    number: int
    secret: bytes

    def board(self) -> Board: ...


class Peers(Protocol):
    """The links to the other members, for the question that decides whether this member may go on
    without the board. peers.py implements it."""

    def ask(self, ids: frozenset[str]) -> object:
        """Ask these members whether they are without the board. Waits for nothing. For each one
        that says so, Cluster.promised(id, asked_at) is called; ``asked_at`` is monotonic, of before
        the question was sent."""


class Cluster:
    """start(), then stop(). Any thread."""

    def __init__(self, config: Settings, registry: Registry, child: Child | None = None):
        self.id = secrets.token_hex(4)
        self.claims = registry
        self.peers: Peers | None = None
        self._card = Card(self.id, host=socket.gethostname(), version=__version__,
                          since=int(time()))  # fmt: skip
        self._callbacks: list[Callable[[Mapping[str, Card]], object]] = []

    # The members

    def members(self) -> Mapping[str, Card]:
        """The members in contact by id, this one included, as the board had it last."""
        return {self.id: self._card}

    def on_members(self, callback: Callable[[Mapping[str, Card]], object]) -> None:
        """Have ``callback(members)`` called after each change, in a thread of the cluster's."""
        self._callbacks.append(callback)

    # Messages between members

    def publish(self, to: str, message: Message) -> None:
        """Send a message to the member ``to``, "" for all others. Waits for nothing; it may get
        lost. ``message["do"]`` names the function that hears it: see on()."""

    def on(self, do: str, hear: Callable[[Message], object]) -> None:
        """Have ``hear(message)`` called for each message whose "do" is this word, in a thread of
        the cluster's. ``message["from"]`` is the sender's id. Before start()."""

    # The safety rule

    def promise(self) -> bool:
        """Another member asks whether this one is without the board. True: it is, or cannot tell,
        and promises to take no name that it did not hold for the next PROMISE. Any thread."""
        return False

    def promised(self, id: str, asked_at: float) -> None:
        """A member that was asked at ``asked_at`` has given that promise. Any thread."""

    def departed(self, id: str) -> None:
        """A member says by its link that it ends, and so will never take a name again."""

    # What the members share

    def storage(self) -> Any:
        """A certs.storage.Storage that all members share; None: each has its own folder."""
        return None

    def locker(self) -> Any:
        return None

    # Life

    def start(self, tunnel_port: int, tunnels: Any) -> None:
        """Join. Waits for nothing: the board may be away. ``tunnel_port`` is the one that agents
        reach this gateway by, ``tunnels`` are its agents.tunnel.Tunnels."""

    def drain(self) -> None:
        """The gateway ends soon: tell the other members, and so all agents, to dial it no more."""

    def stop(self) -> None:
        """Leave: the names are free for other members at once."""
