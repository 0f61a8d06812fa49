"""Tells agents which gateways are one (feature MEMBERS), so that they open a session with each.

Only a gateway that is one of several (cluster/) has a Membership. Then the ack has the gateway's
own id, and a Members message follows it, and again when the members change.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from gotunnel import Members, SessionClosed

log = logging.getLogger("gotunnel.members")

# Seconds from a change until it is told. Members that start or end together are one message; a new
# one has its sessions within a second or two.
DEBOUNCE = 0.3
# Members in a message, the gateway itself included. One takes at most some 300 bytes, and a message
# has 64 KiB. An agent opens sessions with fewer (its MOST_MEMBERS).
MOST_TOLD = 128


class Membership(NamedTuple):
    """What a gateway knows of the members. ``own`` is its id. ``members()`` gives all members'
    addresses for agents by their ids, its own included: "HOST:PORT", or "" for the address that
    agents dial anyway. Any thread calls it; it must not wait."""

    own: str
    members: Callable[[], Mapping[str, str]]

    def message(self, seed: str) -> Members:
        """For one agent. Of too many members it has a random choice, which is the same for the same
        ``seed``: so the agents are shared out evenly, and keep their sessions."""
        members = self.members()
        ranked = sorted(members, key=lambda id: (id != self.own, _rank(seed, id)))
        return Members({id: members[id] for id in sorted(ranked[:MOST_TOLD])})


def _rank(seed: str, id: str) -> bytes:
    return hashlib.blake2b(f"{seed} {id}".encode(), digest_size=8).digest()


class Session(Protocol):
    """What a Teller needs of gotunnel.Session."""

    def call_later(self, delay: float, function: Callable[[], None]) -> None: ...


class Control(Protocol):
    """What a Teller needs of a ControlStream."""

    def send(self, message: Members) -> None: ...


class Teller:
    """Tells one agent of the members. Of several changes at about the same time it tells the
    last."""

    def __init__(self, membership: Membership, session: Session, control: Control, seed: str):
        """``seed``: see Membership.message()."""
        self._membership, self._seed = membership, seed
        self._session, self._control = session, control
        self._told: Members | None = None
        self._begun = False  # the ack is sent
        self._due = False  # a call of _look() is to come
        self._lock = threading.Lock()  # guards the two

    def begin(self) -> None:
        """Tell the members now, right behind the ack. By the thread that sends it."""
        with self._lock:
            self._begun = True  # first: a change from now on is looked at
        self._look()

    def changed(self) -> None:
        """The members have changed. Any thread; waits for nothing."""
        with self._lock:
            if self._due or not self._begun:
                return
            self._due = True
        self._session.call_later(DEBOUNCE, self._look)

    def _look(self) -> None:
        """Tell what has changed. One thread at a time: the demultiplexer, once it runs."""
        with self._lock:
            self._due = False  # first: a change from now on is looked at again
        message = self._membership.message(self._seed)
        if message == self._told:
            return
        try:
            self._control.send(message)
            self._told = message
        except SessionClosed:
            log.debug("an agent left before it was told of the members")
        except OSError:  # no room for the message now
            self.changed()
