"""The rules of a board, as a table: which owner has a name, which members hold it for that owner,
and when another owner may have it.

Pure: the time is handed in, as whole milliseconds of the board's machine. redis_board.py has the
same rules as Lua scripts, and a test compares the two. All methods are for one thread at a time.

**A lease belongs to a member**, not to a name. A member renews it every second, and it covers all
names that the member holds: so a member with 100,000 names costs the board no more than one with a
single name. A name is held by one *owner* at a time (an agent's process, or a pool). Any number of
members may hold it for that owner, as an agent has a session with each of them.

**The board's time** is not the machine's: it advances with the calls, by GAP at most from one call
to the next, and never goes back. So a clock that is set, a server that stood still, and a replica
with another clock that takes over expire no lease early.

**A lease that has run out** is no proof that its member has stopped serving: without the board it
may go on, if each other member that it knew has told it directly that it is without the board, too
(tenure.py). Such an answer is a promise to take no name for PROMISE. So the names of a member that
is out of contact can be taken if

    a witness is there        a member that the lost one knew, that has been in contact for SETTLE,
                              so that its earlier promises have run out, and that was in contact
                              when the lease ran out, so that it cannot have promised then: the lost
                              member has stopped
    or FORGET has passed      since its lease ran out: nobody in contact was known to it

and LATER is the answer until then. The lost member itself, and any member for the same owner, get
the name at once.

**A server that is new to the board** (a restart, a replica that took over, lost data) may lack the
last claims. So each member's contact begins anew, and for SETTLE no new name is granted: all
members in contact ask again for what they hold meanwhile, and a member that cannot has stopped
serving by then. For FORGET, a member whose own contact is younger than SETTLE gets none either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .board import (
    FREE,
    GRANTED,
    LATER,
    LOST,
    TAKEN,
    UNKNOWN,
    Answer,
    Ask,
    Card,
    Left,
    Renewal,
    Renewed,
)


class Times(NamedTuple):
    """In milliseconds. ``lease``: how long a member holds its names after a renewal. ``settle``:
    PROMISE and a margin. The margin is more than ``gap``: the board's time may jump by so much."""

    lease: int = 4000
    settle: int = 5500
    forget: int = 60_000
    gap: int = 1000


TIMES = Times()
MOST_LEFT = 500  # names that one leave() gives back, so that no call takes long


class _Member:
    """``since``: when it was sure to know of its contact, None before. ``last`` and ``before``: its
    last two renewals. ``entered``: the version of the list in which it appeared. ``out``: it is out
    of contact, and no longer in the list. ``turn``: which server its contact is with.

    A member sends a renewal after it got the answer to the one before. So if ``before`` is later
    than an instant, it had promised nothing up to then."""

    __slots__ = (
        "card", "expires", "contact", "turn", "since", "last", "before", "knows", "entered", "out",
    )  # fmt: skip

    def __init__(self, card: Card, contact: int, entered: int):
        self.card = card
        self.expires = 0
        self.contact = contact
        self.turn = 0
        self.since: int | None = None
        self.last = 0
        self.before = 0
        self.knows = 0
        self.entered = entered
        self.out = False


class _Name:
    """``turn``: the server at which it was granted, or asked for again, last."""

    __slots__ = ("owner", "number", "turn", "holders")

    def __init__(self, owner: str, number: int):
        self.owner = owner
        self.number = number
        self.turn = 0
        self.holders: set[str] = set()


class Table:
    """Members and names. ``now`` is the time of the board's machine, ``server`` its identity."""

    def __init__(self, times: Times = TIMES):
        self.times = times
        self.clock = 0  # the board's time
        self._seen: int | None = None  # the machine's time at the last call
        self._server: str | None = None
        self._turn = 0  # counts the servers
        self._settled = 0  # when new names are granted again
        self._version = 0  # of the list of members
        self._number = 0  # the last fencing number, or number of a contact
        self._members: dict[str, _Member] = {}
        self._names: dict[str, _Name] = {}
        self._held: dict[str, set[str]] = {}  # names by member

    # Calls of members

    def renew(self, now: int, id: str, renewal: Renewal, server: str = "") -> Renewed:
        self._tick(now, server)
        gone = self._sweep()
        member = self._members.get(id)
        if member is None:
            self._version += 1
            member = self._members[id] = _Member(renewal.card, 0, self._version)
        elif member.out:
            self._version += 1
            member.out, member.entered, member.contact = False, self._version, 0
        anew = renewal.contact == 0 or not self._is_current(member, renewal.contact)
        if anew:
            self._number += 1
            member.contact, member.turn = self._number, self._turn
            member.since, member.before, member.knows = None, 0, 0
        else:
            member.before, member.knows = member.last, renewal.knows
            if member.since is None:
                member.since = self.clock
        if member.card != renewal.card:
            self._version += 1
            member.card = renewal.card
        member.last = self.clock
        member.expires = self.clock + self.times.lease
        knows = not anew and renewal.knows == self._version
        cards = None if knows else self._cards()
        return Renewed(member.contact, anew, self._version, cards, gone)

    def claim(
        self,
        now: int,
        id: str,
        contact: int,
        asks: Sequence[Ask],
        together: bool,
        server: str = "",
    ) -> tuple[Answer, ...]:
        self._tick(now, server)
        self._sweep()
        member = self._members.get(id)
        if member is None or member.out or not self._is_current(member, contact):
            return tuple(Answer(UNKNOWN) for _ in asks)
        has_promised = not self._is_settled(member)
        verdicts = [self._verdict(id, has_promised, ask) for ask in asks]
        if together and any(verdict.verdict != FREE for verdict in verdicts):
            return tuple(verdicts)
        return tuple(
            self._grant(id, ask) if verdict.verdict == FREE else verdict
            for ask, verdict in zip(asks, verdicts)
        )

    def release(
        self, now: int, id: str, contact: int, names: Sequence[str], server: str = ""
    ) -> tuple[str, ...]:
        self._tick(now, server)
        member = self._members.get(id)
        if member is None or not self._is_current(member, contact):
            return ()
        return tuple(name for name in names if self._drop(id, name))

    def held(self, now: int, id: str, server: str = "") -> tuple[str, ...]:
        self._tick(now, server)
        return tuple(sorted(self._held.get(id, ())))

    def leave(self, now: int, id: str, server: str = "") -> Left:
        self._tick(now, server)
        member = self._members.pop(id, None)
        if member is not None and not member.out:
            self._version += 1
        names = sorted(self._held.get(id, ()))[:MOST_LEFT]
        freed = tuple(name for name in names if self._drop(id, name))
        return Left(freed, bool(self._held.get(id)))

    # The rules

    def _tick(self, now: int, server: str) -> None:
        """Advance the board's time. See the top of this module."""
        if self._seen is not None:
            self.clock += max(0, min(now - self._seen, self.times.gap))
        self._seen = now
        if server != self._server:
            self._server = server
            self._turn += 1
            self._settled = self.clock + self.times.settle

    def _sweep(self) -> tuple[str, ...]:
        """Take members whose lease has run out off the list; forget those out for FORGET."""
        gone = []
        for id, member in sorted(self._members.items()):
            if not member.out and member.expires < self.clock:
                member.out = True
                self._version += 1
            if member.out and member.expires + self.times.forget < self.clock:
                del self._members[id]
                gone.append(id)
        return tuple(gone)

    def _cards(self) -> tuple[Card, ...]:
        return tuple(each.card for _, each in sorted(self._members.items()) if not each.out)

    def _verdict(self, id: str, has_promised: bool, ask: Ask) -> Answer:
        """FREE if the claim can be granted. ``has_promised``: the claimant may have told a member
        that is out of contact that it takes no name."""
        # Of a new claim, while records may be missing or older than what is held.
        if self.clock < self._settled and not ask.number:
            free = Answer(LATER)
        else:
            free = Answer(FREE)
        name = self._names.get(ask.name)
        if name is None:  # perhaps lost with the data of another server, and held there
            is_new = self.clock < self._settled - self.times.settle + self.times.forget
            return Answer(LATER) if has_promised and is_new and not ask.number else free
        if name.owner == ask.owner or ask.was and name.owner == ask.was and name.holders == {id}:
            return free
        # A record of an earlier server may be older than what is held.
        if ask.number > name.number and name.turn != self._turn:
            return free
        living = [each for each in sorted(name.holders) if self._is_in_contact(each)]
        if living:
            return Answer(LOST if ask.number else TAKEN, 0, tuple(living))
        if not has_promised and all(map(self._has_stopped, name.holders)):
            return free
        return Answer(LOST if ask.number else LATER)

    def _is_current(self, member: _Member, contact: int) -> bool:
        return member.contact == contact and member.turn == self._turn

    def _is_settled(self, member: _Member) -> bool:
        """Whether all promises of a member are over that it gave before this contact."""
        if not self.times.settle:  # a board that is never away
            return True
        return member.since is not None and self.clock >= member.since + self.times.settle

    def _is_in_contact(self, id: str) -> bool:
        return id in self._members and not self._members[id].out

    def _has_stopped(self, id: str) -> bool:
        """Whether a member that is out of contact has surely stopped serving."""
        lost = self._members.get(id)
        return lost is None or any(
            not each.out
            and each.turn == self._turn
            and each.entered <= lost.knows
            and each.before > lost.expires
            and self._is_settled(each)
            for each in self._members.values()
        )

    def _grant(self, id: str, ask: Ask) -> Answer:
        self._number = max(self._number, ask.number)
        name = self._names.get(ask.name)
        if name is None or name.owner != ask.owner:
            for holder in () if name is None else sorted(name.holders):
                self._drop(holder, ask.name)
            if ask.number and name is None:
                number = ask.number
            else:
                self._number += 1
                number = self._number
            name = self._names[ask.name] = _Name(ask.owner, number)
        name.turn = self._turn
        name.holders.add(id)
        self._held.setdefault(id, set()).add(ask.name)
        return Answer(GRANTED, name.number, tuple(sorted(name.holders - {id})))

    def _drop(self, id: str, name: str) -> bool:
        """Whether this member held the name, and no member in contact holds it any more."""
        held = self._held.get(id, set())
        if name not in held:
            return False
        held.discard(name)
        if not held:
            del self._held[id]
        holders = self._names[name].holders
        holders.discard(id)
        if not holders:
            del self._names[name]
        # Members that are out of contact are no reason to wait: a claim finds out about them.
        return not any(map(self._is_in_contact, holders))
