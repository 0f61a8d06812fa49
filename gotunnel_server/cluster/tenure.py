"""How long a member may serve the names that it holds: the holder's half of the rules in leases.py.

Pure: monotonic seconds of the member's own clock are handed in. One lock guards it in members.py.

A member serves while its lease runs. It counts from before it *sent* the renewal, and stops MARGIN
earlier than the board: so the board's clock may be a little fast. A member that could not renew in
that time stops, unless each other member that it knew has promised to take no name for PROMISE,
because it is without the board, too. Each promise counts from before the question was sent. Once
the member has stopped, promises that come later change nothing: only the board can have it begin
again.

A member that has promised begins its contact with the board anew: the board then counts SETTLE
before that member can take a name of another one, or be the witness that one has stopped.
"""

from __future__ import annotations

import math
from collections.abc import Collection

RENEW = 1.0  # seconds between two renewals
LEASE = 4.0  # seconds; leases.Times has the board's
# Seconds before the lease ends in which the member stops: the board's time may jump by one (GAP),
# and the member looks every LOOK seconds whether it has to stop.
MARGIN = 1.3
LOOK = 0.2
PROMISE = 4.0  # seconds that a promise counts for its holder. The board's SETTLE is longer
SETTLE = 5.5  # seconds of the board's own; see leases.Times
ASK_AGAIN = 1.0  # seconds after which a promise is asked for again
# A member promises if its last renewal was sent longer ago than this, or has failed. It is more
# than RENEW, so that a member in contact does not.
QUIET = 1.4


class Tenure:
    """Of one member. ``contact`` and ``knows`` are as in board.Renewal."""

    def __init__(self, id: str):
        self._id = id
        self.contact = 0
        self.knows = 0
        self.lapsed = False  # it has stopped serving, and may not begin again yet
        self.until = -math.inf  # it may serve until then, less LOOK
        self._lease_until = -math.inf
        self._sent_at = -math.inf  # of the last renewal that was answered
        self._failed = True  # the last call has failed, or none was made
        self._broken = True  # contact has to begin anew
        self._members: frozenset[str] = frozenset()  # as the board said last
        # What the board may have for the members that this one knows: those of the last renewal
        # that was answered, and of all that were sent since.
        self._said: list[frozenset[str]] = []
        # Those known before the present contact, for its first seconds: an emptied board lists only
        # the members that have renewed since.
        self._earlier: frozenset[str] = frozenset()
        self._earlier_until = -math.inf
        self._promises: dict[str, float] = {}  # member: when it was asked
        self._departed: set[str] = set()

    # Renewals

    def sending(self, now: float) -> tuple[int, int]:
        """A renewal is about to be sent: the contact and the version for it."""
        contact = 0 if self._broken else self.contact
        self._broken = False
        if self._said[-1:] != [self._members]:
            self._said.append(self._members)
        return contact, self.knows

    def renewed(
        self, now: float, sent_at: float, contact: int, anew: bool, version: int,
        members: Collection[str] | None,
    ) -> None:  # fmt: skip
        """The renewal that was sent at ``sent_at`` was answered; see board.Renewed."""
        self._note(now)  # whether it has held until now
        if anew:
            self._earlier, self._earlier_until = self.known, now + SETTLE
        elif now >= self._earlier_until:
            self._earlier = frozenset()
        self._failed = False
        self._said = self._said[-1:]
        self._sent_at = sent_at
        self.contact = contact
        if members is not None:
            self.knows, self._members = version, frozenset(members)
        self._lease_until = sent_at + LEASE - MARGIN
        self._promises.clear()  # those members may be back, too
        if not anew and now < self._lease_until:
            self.lapsed = False
        if not self.lapsed:
            self.until = self._lease_until

    def failed(self) -> None:
        """A call to the board has failed. It may still arrive there, so the contact begins anew."""
        self._failed = self._broken = True

    def resume(self, now: float) -> None:
        """The member has asked again for its names: it may serve those that it got."""
        self.lapsed = False
        self.until = self._lease_until
        self._note(now)

    # Promises

    def promise(self, now: float) -> bool:
        """Whether this member is without the board, or cannot tell. Then it has promised."""
        if not self._failed and now - self._sent_at <= QUIET:
            return False
        self._broken = True
        return True

    def promised(self, now: float, id: str, asked_at: float) -> None:
        """Another member, asked at ``asked_at``, has promised."""
        self._note(now)
        self._promises[id] = max(asked_at, self._promises.get(id, -math.inf))
        self._extend()

    def departed(self, now: float, id: str) -> None:
        """Another member ends, and will take no name any more."""
        self._note(now)
        self._departed.add(id)
        self._extend()

    @property
    def known(self) -> frozenset[str]:
        """The members whose promises are needed."""
        all_ = self._earlier.union(self._members, *self._said)
        self._departed &= all_
        return all_ - {self._id} - self._departed

    def to_ask(self, now: float) -> frozenset[str]:
        """The members that have to be asked for a promise now."""
        if self.lapsed or not self._failed and now - self._sent_at <= QUIET:
            return frozenset()
        asked = self._promises
        return frozenset(id for id in self.known if now - asked.get(id, -math.inf) > ASK_AGAIN)

    # The state

    def holds(self, now: float) -> bool:
        """Whether the member may serve its names now."""
        self._extend()
        self._note(now)
        return not self.lapsed

    @property
    def begins_anew(self) -> bool:
        """The next renewal begins a new contact, and until then nothing may be claimed."""
        return self._broken

    def _note(self, now: float) -> None:
        """Note that the time is up, if it is."""
        if now >= self.until - LOOK:
            self.lapsed = True

    def _extend(self) -> None:
        """Take the promises into account."""
        if not self.lapsed:
            promises = [self._promises.get(id, -math.inf) for id in self.known]
            until = min(promises, default=math.inf) + PROMISE
            self.until = max(self._lease_until, until)
