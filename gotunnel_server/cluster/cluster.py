"""One gateway as a member of several: composes the parts of this wing, and starts and stops them.

It is loaded only where CLUSTER or PROCESSES is set (membership.py in the hall).
"""

from __future__ import annotations

import base64
import logging
import re
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from time import time
from typing import Any, NamedTuple, Protocol

from gotunnel import __version__
from gotunnel_agent.common import addresses
from gotunnel_agent.common.addresses import as_host
from gotunnel_agent.common.metrics_page import is_loopback
from gotunnel_agent.common.one_line import on_one_line

from ..agents.members import Membership
from ..agents.newcomer import REGISTER_TIMEOUT, Newcomers
from ..net.blocks import Blocks
from ..routes import Registry, Route
from . import claims, members, peers
from .board import Board, Card, Message
from .certificates import SharedCertificates
from .claims import SharedClaims
from .counts import SharedCounts
from .former_member import FormerMember
from .members import Member
from .passage import Passages
from .peers import Peers
from .secret import Secret
from .settings import Settings

log = logging.getLogger("gotunnel.cluster")

LOOPBACK = "127.0.0.1"
MOST_LISTED = 1000  # members in a state document
MOST_SHOWN = 300  # characters of what another member says of itself
_SENDER = re.compile("[0-9A-Za-z._-]{1,64}")  # an id
PEER_PORT = "PEER_PORT"  # as a setting in errors: the port for other members, with PROCESSES


class Config(Protocol):
    """What a cluster needs of config.Config."""

    @property
    def cluster(self) -> Settings | None: ...

    @property
    def bind(self) -> tuple[str, ...]: ...

    @property
    def stall_timeout(self) -> float: ...

    @property
    def acme_cache(self) -> Path: ...


class Child(Protocol):
    """What a cluster needs of processes.child.Child: one of the processes of PROCESSES."""

    number: int  # from 1
    secret: bytes

    def board(self) -> Board: ...


class Listeners(Protocol):
    """What a cluster needs of listeners.Listeners."""

    def add(
        self, setting: str, port: int, connections: Any, places: Any, first_timeout: float,
        addresses: Sequence[str] | None = None, /,
    ) -> int: ...  # fmt: skip


class Figures(NamedTuple):
    """For status and metrics."""

    member: members.Figures
    claims: claims.Figures
    peers: peers.Figures | None  # None before start()


class Cluster:
    """start(), then drain() and stop(). Any thread."""

    def __init__(self, config: Config, registry: Registry, child: Child | None = None):
        self.id = secrets.token_hex(4)
        self.settings = config.cluster
        self._bind = config.bind
        self._stall_timeout = config.stall_timeout
        self._child = child
        # For people: the machine, and with PROCESSES which of its gateways.
        self._host = socket.gethostname() if child is None else (
            f"{socket.gethostname()}/{child.number}"
        )  # fmt: skip
        self._registry = registry
        self.engine: Any = None  # an engine.Engine; None with PROCESSES alone
        board, shown = self._board()
        name = "" if self.settings is None else self.settings.name
        # Raw keys, 32 bytes each: the first one signs and encrypts.
        self.keys = _keys(self.settings, child)
        self._member = Member(self.id, board, shown)
        self.claims = SharedClaims(self._member, board, registry)
        self._member.claims = self.claims
        if self.settings is not None:  # else the supervisor sees a process die
            number = 0 if child is None else child.number
            self._member.former = FormerMember(config.acme_cache, number)
        self.peers: Peers | None = None  # from start() on
        self._card = Card(self.id)
        self._hear: dict[str, Callable[[Message], object]] = {}
        board.on_message = self._heard
        for do in ("ask", "alive", "free", "come"):
            self.on(do, getattr(self.claims, f"hear_{do}"))
        self.on("leaving", self._member.hear_leaving)
        self.certificates = self._share(config.acme_cache, name)
        self._counts: SharedCounts | None = None  # from start() on

    def _board(self) -> tuple[Board, str]:
        """The board, and its name for the log."""
        if self.settings is None:
            if self._child is None:
                raise ValueError("neither CLUSTER nor PROCESSES is set")
            return self._child.board(), "the supervisor"
        # Loaded here: the package redis is not needed with PROCESSES alone.
        self.engine = import_module(f"{__package__}.engine").Engine(self.settings)
        board: Board = import_module(f"{__package__}.redis_board").RedisBoard(
            self.engine, self.settings.name
        )
        return board, f"Redis at {self.engine}"

    def _share(self, folder: Path, name: str) -> SharedCertificates:
        if self.engine is None:
            return SharedCertificates(None, name, self.keys, folder, self)
        engine = self.engine
        return SharedCertificates(engine.call, name, self.keys, folder, self, engine.close)

    # The members

    def members(self) -> Mapping[str, Card]:
        """The members in contact by id, this one included, as the board had it last."""
        return self._member.members()

    def on_members(self, callback: Callable[[Mapping[str, Card]], object]) -> None:
        """Have ``callback(members)`` called after each change, in a thread of the cluster's. It
        must not wait. Before start()."""
        self._member.on_members(callback)

    def _for_agents(self) -> Mapping[str, str]:
        """Where agents reach each member that does not end."""
        return {id: card.agents for id, card in self.members().items() if not card.leaving}

    # Messages between members

    def publish(self, to: str, message: Message) -> None:
        """Send a message to the member ``to``, "" for all others. Waits for nothing; it may get
        lost. ``message["do"]`` names the function that hears it: see on()."""
        self._member.publish(to, {**message, "from": self.id})

    def on(self, do: str, hear: Callable[[Message], object]) -> None:
        """Have ``hear(message)`` called for each message whose "do" is this word, in a thread of
        the cluster's. It must not wait. ``message["from"]`` is the sender's id. Before start()."""
        self._hear[do] = hear

    def _heard(self, message: Message) -> None:
        sender, hear = message.get("from"), self._hear.get(str(message.get("do")))
        if hear is None or sender == self.id:
            return  # of a newer version; or our own, to all
        # It is kept, and logged. Any program that can write to Redis can send here.
        if not isinstance(sender, str) or not _SENDER.fullmatch(sender):
            return log.debug("a message without a sender is passed over")
        try:
            hear(message)
        except Exception:
            log.exception("a message of gateway %s was not understood (bug, traceback follows)",
                          message.get("from"))  # fmt: skip

    # The safety rule

    def promise(self) -> bool:
        """Another member asks whether this one is without the board. True: it is, or cannot tell,
        and promises to take no name that it did not hold for the next PROMISE. Any thread."""
        return self._member.promise()

    def promised(self, id: str, asked_at: float) -> None:
        """A member that was asked at ``asked_at`` has given that promise. Any thread."""
        self._member.promised(id, asked_at)

    def departed(self, id: str) -> None:
        """A member says by its link that it ends, and so will never take a name again."""
        self._member.departed(id)

    # What is shown

    def figures(self) -> Figures | None:
        """None with PROCESSES alone: the processes are shown as such."""
        if self.settings is None:
            return None
        passed_on = None if self.peers is None else self.peers.figures()
        return Figures(self._member.figures(), self.claims.figures(), passed_on)

    def unready(self) -> str | None:
        """Why no visitors should be sent here; None if they may be. Without the board a member that
        serves is ready."""
        found = self._member.figures()
        if not found.joined:
            return "no contact with the other gateways yet"
        return None if found.serving else "no contact with the other gateways"

    def describe(self) -> dict[str, Any] | None:
        """For the state document (dashboard/state.py); None as figures()."""
        found = self.figures()
        if found is None:
            return None
        return {
            "member": self.id,
            "board": self._member.board_name,
            "reachable": found.member.reachable,
            "serving": found.member.serving,
            "held": found.claims.held,
            "waiting": found.claims.waiting,
            "members": [
                {
                    "id": card.id, "host": on_one_line(card.host, MOST_SHOWN),
                    "version": on_one_line(card.version, MOST_SHOWN),
                    "address": on_one_line(card.agents or card.peer, MOST_SHOWN),
                    "started_at": card.since, "leaving": card.leaving,
                }
                for card in list(self.members().values())[:MOST_LISTED]
            ],
        }  # fmt: skip

    # Life

    def start(
        self, tunnel_port: int, newcomers: Newcomers, listeners: Listeners, blocks: Blocks | None
    ) -> None:
        """Join. Does not wait for the board, which may be away. ``tunnel_port`` is the one that
        agents reach this gateway by; ``blocks`` None: no address can be blocked here. To be called
        before the listeners start. Raises NoThread, PortError."""
        tunnels = newcomers.tunnels
        self._registry.on_free = lambda names: None  # the board says when nobody has them
        self.claims.on_free = tunnels.standby.freed
        self.claims.waited = tunnels.standby.waited
        tunnels.membership = Membership(self.id, self._for_agents)
        self.peers = others = Peers(
            self.id, secret=Secret(self.keys), registry=self._registry, tunnels=tunnels,
            terms=lambda: newcomers.terms, promise=self.promise, promised=self.promised,
            departed=self.departed, stall_timeout=self._stall_timeout, host=self._host,
        )  # fmt: skip
        newcomers.peers = others
        self._member.peers = others
        self._card = self._own_card(tunnel_port, newcomers, listeners)
        self.on_members(others.change)
        self.on_members(lambda members: tunnels.members_changed())
        self.on_members(lambda members: self.claims.on_free(tunnels.standby.waited()))
        self._counts = counts = SharedCounts(
            self, lambda: self._registry.table, newcomers.attempts, blocks, self.certificates.tick
        )
        self.on_members(lambda members: counts.changed(members.keys() - {self.id}))
        for do in counts.KINDS:
            self.on(do, counts.hear)
        others.start()
        self._member.start(self._card)
        counts.start()

    def _own_card(self, tunnel_port: int, newcomers: Newcomers, listeners: Listeners) -> Card:
        card = Card(self.id, host=self._host, version=__version__, since=int(time()))
        settings, port = self.settings, tunnel_port
        is_shared = self._child is not None or settings is None or settings.address is None
        if settings is None:
            host: str | None = LOOPBACK
        elif settings.address is not None and settings.address[0]:
            host, port = settings.address[0], settings.address[1] or tunnel_port
        else:
            found = self.engine.own_address()
            is_here = found is not None and is_loopback((found,)) or not settings.redis.hosts
            host = _reached_here(self._bind) if is_here else found
            if is_here and is_loopback((host or "",)) and not is_loopback(self._bind):
                # Redis is on this machine, and agents elsewhere do not reach that address.
                is_shared = True
                log.warning("Redis is on this machine, so gateways elsewhere are told %s, which "
                            "leads to themselves: if there are any, set CLUSTER_ADDRESS",
                            host)  # fmt: skip
        if self._child is not None:  # the processes share TUNNEL_PORT
            places = newcomers.listener.places
            bound = (LOOPBACK,) if settings is None else None
            port = listeners.add(PEER_PORT, 0, newcomers.beside(), places, REGISTER_TIMEOUT, bound)
        if host is None:
            log.warning("this gateway cannot tell by which address agents and gateways reach it: "
                        "set CLUSTER_ADDRESS")  # fmt: skip
            return card
        address = f"{as_host(host)}:{port}"
        return card._replace(peer=address, agents="" if is_shared else address)

    def drain(self) -> None:
        """The gateway ends soon: tell the other members, and so all agents, to dial it no more."""
        self._card = self._card._replace(leaving=True)
        self._member.change_card(self._card)
        if self.peers is not None:
            self.peers.drain()

    def elsewhere(self) -> Mapping[str, Route]:
        """The routes to other members' agents. None with PROCESSES: what the processes show is
        joined, and each shows its own agents."""
        if self.peers is None or self._child is not None:
            return {}
        return self.peers.served_elsewhere()

    @property
    def ports(self) -> tuple[Passages, ...]:
        """The visits that other members pass on to agents here."""
        return () if self.peers is None else (self.peers.passages,)

    def stop(self) -> None:
        """Leave: the names are free for other members at once."""
        if self._counts is not None:
            self._counts.stop()
        self._member.stop()
        if self.peers is not None:
            self.peers.stop()


def _reached_here(bound: Sequence[str]) -> str:
    """An address by which other gateways of this machine reach one that listens on ``bound``; none
    stand for all."""
    for text in bound:
        address = addresses.parse(text)
        if address is not None and not address.is_unspecified:
            return text
    return LOOPBACK


def _keys(settings: Settings | None, child: Child | None) -> list[bytes]:
    if settings is not None:
        return [base64.urlsafe_b64decode(key) for key in settings.keys]
    return [] if child is None else [child.secret]
