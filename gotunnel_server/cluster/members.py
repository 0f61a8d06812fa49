"""This gateway as a member: keeps its lease on the board, and knows the other members.

Thread "cluster" makes all calls to the board, one after the other. It may wait for the board, so
no other thread waits for it: claims are noted in claims.py, and this thread fetches them. Thread
"cluster tenure" never waits for the board. It checks whether this member may still serve its
hostnames.

    in contact ----a call fails----> away ----tenure is over----> stopped serving
        ^                              |                               |
        +--- renewed, asked again -----+------- renewed, asked again --+
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import NamedTuple, Protocol

from gotunnel import spawn

from .board import Away, Board, Card, Message, Renewal, Renewed
from .former_member import FormerMember
from .tenure import LEASE, LOOK, RENEW, Tenure

log = logging.getLogger("gotunnel.members")

# Seconds until the second renewal of a contact: only that one shows the board that this member
# knows of its contact, and so has stopped making promises.
SOON = 0.1
# Seconds for which a member still counts that is not listed when this one has contact again: it may
# not have renewed yet.
GRACE = 3.0
RETRY = 0.5  # seconds from a call that has failed to the next one
MOST_MESSAGES = 1000  # that wait to be sent; the oldest ones are dropped
JOIN = 5  # seconds for the threads to end: each of two calls may take two


class Stale(Exception):
    """The board does not know this contact any more: renew, and ask again for everything."""


class Claims(Protocol):
    """What a member needs of claims.SharedClaims."""

    def work(self, contact: int, until: float) -> None:
        """Make the calls that are due, for so long. Raises Away, Stale."""

    def ask_again(self, contact: int, may_serve: bool) -> None:
        """Ask for all names again: the contact has just begun. ``may_serve``: they were served
        without a gap. Raises Away, Stale."""

    def stop_serving(self) -> None: ...

    def serve_again(self) -> None: ...

    def tick(self) -> None:
        """What is to be done now and then, without waiting for the board."""

    def away(self) -> None:
        """The board is away: what was asked gets no answer."""


class Peers(Protocol):
    """The links to the other members (peers.Peers)."""

    def ask(self, ids: frozenset[str], /) -> object:
        """Ask these members whether they are without the board. Waits for nothing. For each one
        that says so, Member.promised(id, asked_at) is called; ``asked_at`` is monotonic, of before
        the question was sent."""


class Figures(NamedTuple):
    """For status and metrics. ``reachable``: the last call to the board has succeeded; ``joined``:
    one has. ``serving``: what is held may be served."""

    reachable: bool
    joined: bool
    serving: bool
    members: int
    outages: int  # since the start
    stops: int  # how often this member stopped serving, since the start
    round_trip: float  # seconds of the last renewal


class Member:
    """start(), then stop()."""

    def __init__(self, id: str, board: Board, board_name: str):
        """``board_name`` is for the log: "Redis at ..."."""
        self.id = id
        self.claims: Claims  # set before start()
        self.peers: Peers | None = None
        self.former: FormerMember | None = None
        self.board_name = board_name
        self._board = board
        self._card = Card(id)
        self._callbacks: list[Callable[[Mapping[str, Card]], object]] = []
        self._members: Mapping[str, Card] = {}  # replaced whole
        self._lock = threading.Lock()  # guards _tenure and _serving
        self._tenure = Tenure(id)
        self._serving = True
        self._turn = threading.Condition()  # over all below
        self._messages: deque[tuple[str, Message]] = deque(maxlen=MOST_MESSAGES)
        self._wanted = False  # there is work
        self._due = 0.0  # monotonic, of the next renewal
        self._ended_well: set[str] = set()  # members that have said that they end
        self._over = False
        # Thread "cluster" only
        self._listed: Mapping[str, Card] = {}  # by the board
        self._missed: Mapping[str, Card] = {}  # no longer listed, and perhaps back soon
        self._missed_until = 0.0  # monotonic
        self._away_since: float | None = monotonic()
        self._was_there = False
        self._dead: set[str] = set()  # members whose names the board has to give back
        self._asks = False  # all names have to be asked for again
        self._outages = self._stops = 0
        self._round_trip = 0.0
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()

    # For the other parts

    def members(self) -> Mapping[str, Card]:
        return self._members

    def on_members(self, callback: Callable[[Mapping[str, Card]], object]) -> None:
        self._callbacks.append(callback)

    def publish(self, to: str, message: Message) -> None:
        """Waits for nothing. Messages get lost while the board is away."""
        with self._turn:
            self._messages.append((to, message))
            self._turn.notify_all()

    def wake(self) -> None:
        """There is work for claims.work(). Any thread; waits for nothing."""
        with self._turn:
            self._wanted = True
            self._turn.notify_all()

    def is_away(self) -> bool:
        return self._away_since is not None

    def serves(self) -> bool:
        """Whether the names that are held may be served now."""
        with self._lock:
            return self._serving

    def promise(self) -> bool:
        """See Cluster.promise()."""
        with self._lock:
            return self._tenure.promise(monotonic())

    def promised(self, id: str, asked_at: float) -> None:
        """See Cluster.promised()."""
        with self._lock:
            self._tenure.promised(monotonic(), id, asked_at)

    def departed(self, id: str) -> None:
        """See Cluster.departed()."""
        with self._lock:
            self._tenure.departed(monotonic(), id)

    def hear_leaving(self, message: Message) -> None:
        """Another member says that it ends: learn soon who is left."""
        id = message.get("from")
        if id not in self._members:
            return
        with self._turn:
            self._ended_well.add(str(id))
            self._due = min(self._due, monotonic() + SOON)
            self._turn.notify_all()

    def figures(self) -> Figures:
        return Figures(
            not self.is_away(), self._was_there, self.serves(), len(self._members),
            self._outages, self._stops,
            self._round_trip,
        )  # fmt: skip

    def change_card(self, card: Card) -> None:
        """Tell the others something else of this member, soon."""
        with self._turn:
            self._card = card
            self._due = 0.0
            self._turn.notify_all()

    # Life

    def start(self, card: Card) -> None:
        """Waits for nothing. Raises NoThread."""
        self._card = card
        self._members = {self.id: card}
        self._board.start(self.id)
        self._threads = [
            spawn("cluster", self._run),
            spawn("cluster tenure", self._watch),
        ]

    def stop(self) -> None:
        """Leave: the names are free at once, if the board can be reached."""
        with self._turn:
            self._over = True
            self._turn.notify_all()
        self._ended.set()
        for thread in self._threads:
            thread.join(JOIN)
        self._board.stop()

    # Thread "cluster"

    def _run(self) -> None:
        while True:
            with self._turn:
                while not self._over and not self._is_turn():
                    self._turn.wait(max(0.0, self._due - monotonic()))
                if self._over:
                    break
                renews = monotonic() >= self._due
                self._wanted = False
            try:
                if renews:
                    self._renew()
                if not self.is_away():
                    self._work()
            except Away as error:
                self._lose(error)
            except Stale:
                self._begin_anew()
            except Exception as error:  # else the names would be lost for good
                log.exception("a call to %s failed (bug, traceback follows); next try in %g s",
                              self.board_name, RETRY)  # fmt: skip
                self._lose(Away(type(error).__name__))
        self._leave()

    def _is_turn(self) -> bool:
        """Caller holds _turn."""
        has_work = (self._wanted or self._messages) and not self.is_away()
        return monotonic() >= self._due or bool(has_work)

    def _renew(self) -> None:
        renewed, may_serve = self._send()
        now = monotonic()
        if renewed.anew:
            self._due = now + SOON
            self._asks = True
        if self._asks:
            self.claims.ask_again(renewed.contact, may_serve)
            self._asks = False
            with self._lock:
                self._tenure.resume(monotonic())
        with self._lock:
            begins = not self._serving and self._tenure.holds(monotonic())
            self._serving = self._serving or begins
        if begins:
            self.claims.serve_again()
        self._note_contact(begins)
        self._dead |= {*renewed.gone, *self._dead_before()}
        while self._dead:
            id = next(iter(self._dead))
            while self._board.leave(id).more:
                pass
            self._dead.discard(id)

    def _send(self) -> tuple[Renewed, bool]:
        """Renew the lease. Returns the board's answer, and whether the names were served without a
        gap until now."""
        sent_at = monotonic()
        self._due = sent_at + RENEW
        with self._lock:
            contact, knows = self._tenure.sending(sent_at)
        renewed = self._board.renew(self.id, Renewal(self._card, contact, knows))
        now = monotonic()
        self._round_trip = now - sent_at
        ids = None if renewed.members is None else [card.id for card in renewed.members]
        with self._lock:
            may_serve = self._tenure.holds(now)
            # As long as the names are not all asked for again, the contact has just begun.
            anew = renewed.anew or self._asks
            self._tenure.renewed(now, sent_at, renewed.contact, anew, renewed.version, ids)
        if renewed.members is not None:
            self._listed = {card.id: card for card in renewed.members}
        self._learn(now, renewed.anew)
        return renewed, may_serve

    def keep(self) -> None:
        """Renew the lease if it is time, in the middle of other calls. Thread "cluster". Raises
        Away, Stale."""
        if monotonic() >= self._due:
            renewed, _ = self._send()
            if renewed.anew:
                raise Stale

    def _dead_before(self) -> Iterator[str]:
        """The member that this gateway was before it was restarted, if it has died."""
        former = self.former
        if former is not None and not former.is_taken:
            id = former.take(self.id)
            if id is not None:
                log.info("gateway %s, which ran here before, has died: its hostnames are free", id)
                yield id

    def _work(self) -> None:
        with self._turn:
            messages = list(self._messages)
            self._messages.clear()
        for to, message in messages:
            self._board.publish(to, message)
        with self._lock:
            contact, begins_anew = self._tenure.contact, self._tenure.begins_anew
        if begins_anew:  # it has promised meanwhile to take no name
            self._due = 0.0
        else:
            self.claims.work(contact, self._due)

    def _begin_anew(self) -> None:
        with self._lock:
            self._tenure.failed()
        self._due = 0.0

    def _lose(self, error: Away) -> None:
        """A call has failed."""
        with self._lock:
            self._tenure.failed()
        self._due = monotonic() + RETRY
        if self._away_since is None:
            self._away_since = monotonic()
            self._outages += 1
            log.warning("no contact with the other gateways: %s; what is served goes on being "
                        "served, other hostnames wait", error)  # fmt: skip
        elif not self._was_there and self._outages == 0:
            self._outages = 1
            log.warning("no contact with the other gateways yet: %s; hostnames wait", error)
        self.claims.away()

    def _note_contact(self, begins: bool) -> None:
        since, self._away_since = self._away_since, None
        if since is None:
            return
        if self._was_there or self._outages:
            log.info("%s answers again, after %.1f s%s", self.board_name, monotonic() - since,
                     "; hostnames are served again" if begins else "")  # fmt: skip
        self._was_there = True
        self.wake()

    def _learn(self, now: float, anew: bool) -> None:
        """Look whether the members have changed."""
        before = self._members
        if anew:  # a board that has lost its data lists only those that have renewed since
            missing = before.keys() - self._listed.keys()
            self._missed = {id: before[id] for id in missing}
            self._missed_until = now + GRACE
        elif now >= self._missed_until:
            self._missed = {}
        members = {**self._missed, **self._listed}
        if members == before:
            return
        self._members = members
        # Without Redis the supervisor says which process starts and ends, once for all of them.
        level = logging.DEBUG if self.former is None else logging.INFO
        for id in members.keys() - before.keys() - {self.id}:
            log.log(level, "gateway %s at %s has joined (version %s); members: %d", id,
                    members[id].host, members[id].version, len(members))  # fmt: skip
        self._ended_well |= {id for id, card in before.items() if card.leaving}
        for id in before.keys() - members.keys() - {self.id}:
            how = (
                "has left" if id in self._ended_well else f"is gone, no sign of life in {LEASE:g} s"
            )
            log.log(level, "gateway %s at %s %s; members: %d", id, before[id].host, how,
                    len(members))  # fmt: skip
        self._ended_well &= members.keys()
        for callback in self._callbacks:
            callback(members)

    def _leave(self) -> None:
        try:
            self._board.publish("", {"do": "leaving", "from": self.id})
            while (left := self._board.leave(self.id)).more:
                pass
            if left.freed:
                self._board.publish("", {"do": "free", "from": self.id, "names": left.freed})
            if self.former is not None:
                self.former.close()
        except Away as error:
            log.warning("the other gateways were not told that this one ends: %s; its hostnames "
                        "are free when its lease is over", error)  # fmt: skip

    # Thread "cluster tenure"

    def _watch(self) -> None:
        while not self._ended.wait(LOOK):
            self._look()
            try:
                self.claims.tick()
            except Exception:
                log.exception("looking after claims failed (bug, traceback follows)")

    def _look(self) -> None:
        now = monotonic()
        with self._lock:
            ids = self._tenure.to_ask(now)
        peers = self.peers
        if ids and peers is not None:
            peers.ask(ids)
        with self._lock:
            stops = self._serving and not self._tenure.holds(monotonic())
            if stops:
                self._serving = False
                self._stops += 1
        if stops:
            log.warning("this gateway serves its hostnames no longer, until %s answers: other "
                        "gateways may reach it, and have them by now", self.board_name)  # fmt: skip
            self.claims.stop_serving()
