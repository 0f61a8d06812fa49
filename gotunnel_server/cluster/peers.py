"""The other gateways of the cluster, as far as visits are concerned: each member dials each other
one, and tells it which hostnames its own agents have.

So between two members there are two connections, one for each direction: over the one that this
member has dialled come the visits for its agents (peer_session.py, passage.py), and visits for the
other one's agents go over the one that it has accepted (peer_tunnel.py). Members prove each other
that they have the cluster's secret (secret.py).

Thread "peers" looks at what has changed among the agents here and has each peer told, at most
every TELL seconds.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, NamedTuple

from gotunnel import NoThread, Session, Stream, call_logged, spawn
from gotunnel_agent.common.duplex import STALL_TIMEOUT
from gotunnel_agent.common.process import Workers

from ..agents.registration import Terms
from ..agents.tunnel import Tunnels
from ..routes import Registry, Route
from .origin import Greeting
from .passage import Passages
from .peer_session import Member, PeerSession, Told
from .peer_tunnel import Accepted, Elsewhere, PeerTunnel, Shared
from .secret import NAME, Secret

log = logging.getLogger("gotunnel.peers")

TELL = 0.05  # seconds between two looks at what has changed: many agents may come at once
# Threads that copy the visits of peers. They never wait for a peer, so few are enough.
PASSAGE_THREADS = min(max(os.cpu_count() or 1, 2), 8)
FAREWELL = 0.5  # seconds to tell all peers that this member ends
JOIN = 3  # seconds for a thread to end: it may be dialling


class Figures(NamedTuple):
    """For the metrics. ``members``: others; ``connected`` of them can send visits here, and
    ``accepted`` of them take visits from here. ``hostnames``: that only other members' agents have.
    Streams: ``received`` from other members since the start, ``sent`` to them, and ``running`` ones
    of the first kind, those included that are kept for the next visit."""

    members: int
    connected: int
    accepted: int
    hostnames: int
    received: int
    sent: int
    running: int


class Peers:
    """The other members, and the visits between them and this one. Any thread."""

    name = NAME  # the SNI of peers' connections

    def __init__(
        self, own: str, *, secret: Secret, registry: Registry, tunnels: Tunnels,
        terms: Callable[[], Terms], promise: Callable[[], bool],
        promised: Callable[[str, float], object], departed: Callable[[str], object],
        host: str = "", stall_timeout: float = STALL_TIMEOUT,
    ):  # fmt: skip
        """``own`` is the id of this member, ``host`` its machine's name. The three functions are
        those of Cluster: ``promise()`` answers a member that asks whether this one is without the
        board, ``promised(id, asked_at)`` is told what others have answered to ask(), and
        ``departed(id)`` that one ends."""
        self._own = Greeting(own, host or socket.gethostname())
        self._registry = registry
        self._dialling = secret.for_dialling()
        self.context: ssl.SSLContext = secret.for_accepting()
        self._workers = Workers(PASSAGE_THREADS, "passage")
        self._promised = promised
        self._stall_timeout = stall_timeout
        self.passages = Passages(registry, self._workers.submit)
        self._shared = Shared(
            own=self._own, elsewhere=Elsewhere(registry, self._workers.submit), tunnels=tunnels,
            terms=terms, promise=promise, submit=self._workers.submit,
            on_greeting=self._greeted, on_end=self._ended, departed=departed,
        )  # fmt: skip
        self._lock = threading.Lock()  # guards all below, but for _told
        self._members: Mapping[str, Member] = {}
        self._sessions: dict[str, PeerSession] = {}  # by the member's id; replaced whole
        self._left: list[PeerSession] = []  # that are ending
        self._accepted: set[Accepted] = set()
        self._draining = False
        self._told: dict[str, Told] = {}  # by Tunnel.id; thread "peers" replaces it
        self._over = threading.Event()  # stop() was called
        self._changed = threading.Event()  # there is something to do for that thread
        self._thread: threading.Thread | None = None
        registry.on_change = self._changed.set

    def start(self) -> None:
        """Dial the members. Raises NoThread."""
        self._workers.prepare()
        self._changed.set()
        self._thread = spawn("peers", self._run)

    def change(self, members: Mapping[str, Member]) -> None:
        """These are the members now, by id; this one may be among them. Does not wait."""
        with self._lock:
            before, self._members = self._members, members
            accepted = list(self._accepted)
        for connection in accepted:
            if connection.peer.id in before.keys() ^ members.keys():
                connection.admit(connection.peer.id in members)
        self._changed.set()

    def ask(self, ids: frozenset[str]) -> None:
        """Ask these members whether they are without the board: ``promised()`` gets what they
        answer. Waits for nothing."""
        with self._lock:
            sessions = [session for id, session in self._sessions.items() if id in ids]
        for session in sessions:
            session.ask()

    def served_elsewhere(self) -> dict[str, Route]:
        """The routes of hostnames that only agents of other members have."""
        return {
            hostname: route for hostname, route in self._registry.routes().items()
            if isinstance(route.tunnel, PeerTunnel)
        }  # fmt: skip

    def figures(self) -> Figures:
        with self._lock:
            sessions, accepted = list(self._sessions.values()), set(self._accepted)
        hostnames = len(self._registry.routes()) - len(self._registry.held())
        return Figures(
            len(sessions),
            sum(session.connected for session in sessions),
            len({each.peer.id for each in accepted if each.peer.id}),
            hostnames,
            self.passages.total.value,
            self._shared.sent.value,
            self.passages.running,
        )

    def drain(self) -> None:
        """The gateway stops: the peers send no new visits; those that run go on. Does not wait."""
        with self._lock:
            self._draining = True
            sessions = [*self._sessions.values()]
        for session in sessions:
            session.leave()

    def stop(self) -> None:
        """End all connections, and wait for their threads."""
        with self._lock:
            self._over.set()
            sessions = [*self._sessions.values(), *self._left]
            accepted = list(self._accepted)
        self._changed.set()
        deadline = monotonic() + FAREWELL
        for told in [session.depart() for session in sessions]:
            if told is not None:
                told.wait(max(0, deadline - monotonic()))
        for session in sessions:
            session.stop("the gateway stops")
        for connection in accepted:
            connection.close("the gateway stops")
        if self._thread is not None:
            self._thread.join(JOIN)
        for session in sessions:
            session.join(JOIN)
        for connection in accepted:
            connection.session.join(JOIN)
        self._workers.shutdown(JOIN)

    # For agents/newcomer.py

    def welcome(
        self, session: Session, control: Stream, address: str, leave: Callable[[], object]
    ) -> None:
        """Take over a connection whose TLS has proved that it is a member's. ``session`` is not
        started; ``leave()`` is called when it is closed. Raises NoThread, SessionClosed."""
        connection = Accepted(self._shared, session, control, address, leave)
        with self._lock:
            if self._over.is_set():
                raise ConnectionAbortedError("the gateway stops")
            self._accepted.add(connection)
        connection.start()

    def _greeted(self, connection: Accepted) -> None:
        """A member has one connection that takes visits, the newest: the one before has most likely
        died unnoticed, or is retired."""
        with self._lock:
            older = [
                each for each in self._accepted
                if each is not connection and each.peer.id == connection.peer.id
            ]  # fmt: skip
        for each in older:
            each.retire()

    def _ended(self, connection: Accepted) -> None:
        with self._lock:
            self._accepted.discard(connection)

    # Thread "peers"

    def _run(self) -> None:
        while not self._over.is_set():
            self._changed.wait()
            self._changed.clear()
            call_logged(lambda: self._tell(self._look_at_members()))
            self._over.wait(TELL)

    def _look_at_members(self) -> list[PeerSession]:
        """Dial new members, and end the sessions with those that are gone; the sessions."""
        with self._lock:
            if self._over.is_set() or self._draining:
                return []
            wanted = {
                id: member for id, member in self._members.items()
                if id != self._own.id and member.peer
            }  # fmt: skip
            sessions = dict(self._sessions)
        gone = [
            session for id, session in sessions.items()
            if id not in wanted or session.member.peer != wanted[id].peer
        ]  # fmt: skip
        for session in gone:
            del sessions[session.member.id]
            session.retire()
        for id, member in wanted.items():
            if id not in sessions:
                try:
                    sessions[id] = self._dial(member)
                except NoThread as error:
                    log.warning("gateway %s is not dialled yet: %s", id, error)
        with self._lock:
            self._sessions = sessions
            self._left = [each for each in self._left if not each.is_over] + gone
            over, draining = self._over.is_set(), self._draining
        for session in sessions.values() if over or draining else ():  # they have missed it
            session.stop("the gateway stops") if over else session.leave()
        return list(sessions.values())

    def _dial(self, member: Member) -> PeerSession:
        """Raises NoThread."""
        session = PeerSession(
            member, self._own, self._dialling, self.passages, self._workers.submit,
            self._promised, self._stall_timeout,
        )  # fmt: skip
        session.tell(self._told, ())
        return session

    def _tell(self, sessions: list[PeerSession]) -> None:
        """Have the peers told what has changed among the agents here."""
        routes: dict[Any, dict[str, Route]] = {}
        for hostname, route in self._registry.held().items():
            routes.setdefault(route.tunnel, {})[hostname] = route
        told = {tunnel.id: Told(tunnel, its) for tunnel, its in routes.items()}
        before, self._told = self._told, told
        # Those that are gone come last: another session may have their hostnames now.
        changed = [id for id in (*told, *(before.keys() - told.keys()))
                   if before.get(id) != told.get(id)]  # fmt: skip
        if changed:
            for session in sessions:
                session.tell(told, changed)
