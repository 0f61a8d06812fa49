"""Standby: agents that wait for hostnames which others serve; the gateway tells them when one is
free (feature WAITS).

For each hostname there is a queue, in the order of arrival. When the hostname is free, only the
first agent in it is told; it registers the hostname by another session. If it has not done so
within TURN, the next one is told as well. So a crowd of waiting agents does not dial all at once
(thundering herd).

While agents wait, the holder of their hostname is watched: the gateway asks it for a sign of life
so often that its death without a word is noticed within 3 s (heartbeat.WATCHED_TIMEOUT).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gotunnel_agent.common.one_line import some

# Sessions that wait at a time, with any number of hostnames. Further agents are refused, and try
# again later. Each costs what any session costs, and some hundred bytes for each hostname.
MOST_WAITING = 1024
# Seconds that an agent has to register a hostname that it was told of, before the next one is told:
# some round trips. If both come, the first one gets it.
TURN = 1


class Holder(Protocol):
    """The session that has a hostname: a tunnel.Tunnel, or one at another gateway."""

    def holds(self, hostname: str, /) -> bool:
        """Whether it still has the hostname."""

    def watch(self, watched: bool, /) -> None:
        """Ask its agent for signs of life often, from now on or no more. Does not wait."""


class Waiting(Protocol):
    """A session that waits (tunnel.Tunnel)."""

    agent: Any  # a registration.Agent

    def tell_free(self, hostname: str, /) -> bool:
        """Tell its agent that a hostname is free. Does not wait. False if that cannot be sent."""

    def call_later(self, seconds: float, function: Callable[[], None], /) -> None: ...


class Registry(Protocol):
    """What this module needs of routes.Registry."""

    def holders(self, hostname: str, /) -> Sequence[Any]: ...


@dataclass(eq=False)
class _Place:
    """A place in the queue of one hostname."""

    waiting: Waiting
    told: bool = False  # since the hostname is free, or a pool has it


class _Queue:
    """The agents that wait for one hostname."""

    def __init__(self, holder: Holder | None):
        self.places: list[_Place] = []  # the first one first
        self.holder = holder  # None: the hostname is free, or it is not known who has it

    def next(self) -> _Place | None:
        return next((place for place in self.places if not place.told), None)


class Standby:
    """The agents of one gateway that wait. Any thread; no method waits.

    Under the lock it is only decided whom to tell and whom to watch. That is done without it.
    """

    def __init__(self, registry: Registry):
        self._registry = registry
        # Held while holders are told whether they are watched: else an older decision could be the
        # last one that a holder hears.
        self._reviewing = threading.Lock()
        self._lock = threading.Lock()  # guards all below
        self._queues: dict[str, _Queue] = {}  # by hostname; none is empty
        self._sessions: dict[Waiting, frozenset[str]] = {}  # the hostnames that each waits for
        self._watched: frozenset[Holder] = frozenset()

    def wait(self, waiting: Waiting, holders: Mapping[str, Holder]) -> bool:
        """A session waits from now on for hostnames that these holders have. It takes the place of
        an earlier session of the same process. False, and no change, if too many wait."""
        with self._lock:
            if len(self._sessions) >= MOST_WAITING and waiting not in self._sessions:
                return False
            self._sessions[waiting] = frozenset(holders)
            for hostname, holder in holders.items():
                queue = self._queues.setdefault(hostname, _Queue(holder))
                queue.holder = holder
                for place in queue.places:
                    if waiting.agent.is_same_process(place.waiting.agent):
                        place.waiting = waiting
                        break
                else:
                    queue.places.append(_Place(waiting))
        self._review()
        # A holder may have gone between the claim and now.
        self.freed([hostname for hostname, holder in holders.items() if not holder.holds(hostname)])
        return True

    def has_room(self) -> bool:
        """Whether another session may wait."""
        return len(self._sessions) < MOST_WAITING

    def forget(self, waiting: Waiting) -> None:
        """A session waits no more: it is over."""
        with self._lock:
            hostnames = self._sessions.pop(waiting, frozenset())
            passed_on = [name for name in hostnames if self._leave(name, waiting)]
        if hostnames:
            self._review()
            for hostname in passed_on:
                self._tell_next(hostname)

    def _leave(self, hostname: str, waiting: Waiting) -> bool:
        """Give up a place. Returns whether it was told that the hostname is free, and others wait
        for it, too. Caller holds the lock."""
        queue = self._queues.get(hostname)
        places = [] if queue is None else [p for p in queue.places if p.waiting is waiting]
        if queue is None or not places:
            return False
        (place,) = places
        queue.places.remove(place)
        if not queue.places:
            del self._queues[hostname]
        return place.told and queue.holder is None and bool(queue.places)

    def freed(self, hostnames: Collection[str]) -> None:
        """Nobody has these hostnames any more: tell the first agent that waits for each."""
        if not self._queues:
            return
        with self._lock:
            found = [hostname for hostname in hostnames if hostname in self._queues]
            for hostname in found:
                queue = self._queues[hostname]
                # Another one may have it already.
                queue.holder = next(iter(self._registry.holders(hostname)), None)
                for place in queue.places:
                    place.told = False
        if found:
            self._review()
            for hostname in found:
                self._tell_next(hostname)

    def _tell_next(self, hostname: str) -> None:
        """Tell the next agent that a hostname is free, unless it is not any more."""
        while True:
            with self._lock:
                queue = self._queues.get(hostname)
                place = queue.next() if queue is not None and queue.holder is None else None
                if place is None:
                    return
                place.told = True
            if place.waiting.tell_free(hostname):
                place.waiting.call_later(TURN, lambda: self._tell_next(hostname))
                return

    def held(self, holders: Mapping[str, Holder], pooled: Collection[str] = ()) -> None:
        """Hostnames have these holders now. Those ``pooled`` are a pool's, which the others may
        join: each is told once."""
        if not self._queues:
            return
        with self._lock:
            found = [hostname for hostname in holders if hostname in self._queues]
            tell = []
            for hostname in found:
                queue = self._queues[hostname]
                queue.holder = holders[hostname]
                if hostname in pooled:
                    tell += [(place.waiting, hostname) for place in queue.places if not place.told]
                    for place in queue.places:
                        place.told = True
        if found:
            self._review()
        for waiting, hostname in tell:
            waiting.tell_free(hostname)

    def _review(self) -> None:
        """Watch the holders of hostnames that agents wait for, and no others."""
        with self._reviewing:
            with self._lock:
                holders = {queue.holder for queue in self._queues.values()}
                wanted = frozenset(holder for holder in holders if holder is not None)
                begin, end, self._watched = wanted - self._watched, self._watched - wanted, wanted
            for holder in end:
                holder.watch(False)
            for holder in begin:
                holder.watch(True)

    def waited(self) -> frozenset[str]:
        """The hostnames that agents of this gateway wait for."""
        with self._lock:
            return frozenset(self._queues)

    def waiting(self) -> dict[Waiting, frozenset[str]]:
        """The sessions that wait, the first one first, and for which hostnames."""
        with self._lock:
            return dict(self._sessions)

    def knows(self, agent: Any) -> bool:
        """Whether a session of the same process waits here."""
        with self._lock:
            return any(agent.is_same_process(each.agent) for each in self._sessions)


def in_wait(hostnames: Iterable[str]) -> str:
    return f"waits for {some(hostnames)}, which another agent serves"
