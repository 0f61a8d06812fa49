"""Visits that wait for an agent that has just left and is expected back.

An agent or a gateway that is restarted is away for a second or two. A visit that comes meanwhile
waits here for AGENT_TIMEOUT at most, without a thread, and is served when the agent has registered
the hostname again; otherwise it gets the page that it would have got at once. The registry
(routes.py) knows which hostnames are awaited, and for how long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from ..net.listener import Listener, Parkable
from ..net.shares import Addresses, Shares
from ..routes import Registry, Tunnel

# Visits that wait at a time. Each holds a connection, which counts as any other, and some memory.
# With shares.PARTS an address alone has a third of them.
MOST_WAITING = 1024


@dataclass(eq=False)
class Guest:
    """A visit that waits for ``hostname`` to be served by another tunnel than ``lost``."""

    hostname: str
    lost: Tunnel | None
    connection: Parkable
    listener: Listener
    resume: Callable[[], object]


class WaitingRoom:
    """The visits that wait. Any thread.

    Invariant: the thread that takes a guest out of ``_guests`` owns its connection. So the visit is
    resumed once, though its timeout may end just when its agent comes.
    """

    def __init__(self, registry: Registry, proxies: Addresses, timeout: float):
        """``proxies`` have no limit of their own, since each stands for many visitors. A visit
        waits ``timeout`` seconds; 0: none waits."""
        self.timeout = timeout
        # Empty: no agent is expected.
        self.absent: Collection[str] = registry.absent if timeout else ()
        self._registry = registry
        self._places = Shares(MOST_WAITING, proxies)
        self._guests: set[Guest] = set()
        self._lock = threading.Lock()  # guards _guests
        registry.on_claim = self.look

    def enter(
        self,
        hostname: str,
        connection: Parkable,
        listener: Listener,
        resume: Callable[[], object],
        timeout: float,
        lost: Tunnel | None = None,
    ) -> bool:
        """Have a worker call ``resume()`` when the hostname is served again, or the timeout has
        passed; that worker owns the connection then. Returns False if the visit need not wait, or
        no place is free: then the caller still owns it. ``lost``: a tunnel that could not take the
        visit."""
        if not self.timeout or lost is None and not self._registry.awaits(hostname):
            return False
        if not self._places.enter(connection.address[0]):
            return False
        guest = Guest(hostname, lost, connection, listener, resume)
        with self._lock:
            self._guests.add(guest)
        try:
            listener.call_later(connection, partial(self._call, guest), timeout)
        except OSError:  # the gateway stops
            return not self._take_out(guest)
        return not (self._is_back(guest) and self._take_out(guest))

    def look(self) -> None:
        """Look which waiting visits can go on. Called when hostnames have been registered: resumes
        the visits to them. Does not wait."""
        self._resume(self._is_back)

    def give_up(self) -> None:
        """The gateway stops, and no agent comes any more: resume all visits. Does not wait."""
        self._resume(lambda guest: True)

    def _resume(self, wanted: Callable[[Guest], bool]) -> None:
        with self._lock:
            found = [guest for guest in self._guests if wanted(guest)]
        for guest in found:
            guest.listener.call_later(guest.connection, partial(self._call, guest), 0)

    def _is_back(self, guest: Guest) -> bool:
        route = self._registry.lookup(guest.hostname)
        return route is not None and route.tunnel is not guest.lost

    def _call(self, guest: Guest) -> None:
        """Worker: resume a visit, unless another thread has done so."""
        if self._take_out(guest):
            guest.resume()

    def _take_out(self, guest: Guest) -> bool:
        with self._lock:
            if guest not in self._guests:
                return False
            self._guests.discard(guest)
        self._places.leave(guest.connection.address[0])
        return True
