"""Limits by address: places are shared among addresses, so that no address takes them all.

Counted here are connections (``Places``, net/listener.py), requests and relays (``Shares``,
visitors/port.py). An IPv6 address counts by its /64, the smallest block that a subscriber gets
(addresses.counted_by).

The share falls with the places left, as in the dynamic thresholds of shared switch buffers
(Choudhury and Hahne, 1998): an address may take another place while the number that it holds is
below the number of free places divided by ``parts``. With 2 parts one address alone gets a third,
the next one a third of the rest, and so on: five addresses leave 13 % of all places, ten still
leave 2 %. An address that holds nothing gets a place as long as one is free. A trusted proxy stands
for many visitors and is exempt; once it has named a visitor, that visitor's address counts.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Hashable
from typing import Protocol

from gotunnel_agent.common.addresses import counted_by

# An address alone gets 1/3. That is enough for an office behind one address, or for a browser at a
# small gateway, and the rest serves all others.
PARTS = 2
# For connections that have not asked for anything yet, an address alone gets 1/8. This state lasts
# some 0.1 s (10 s if a browser opens a spare connection), so no honest address needs so many. Five
# flooding addresses leave half of the places free.
SILENT_PARTS = 7


class Addresses(Protocol):
    """A set of IP addresses as text, such as forwarded.Proxies."""

    def __contains__(self, address: str, /) -> bool: ...


class Shares:
    """Places of which each address has a share. Any thread."""

    def __init__(self, most: int, exempt: Addresses = (), parts: int = PARTS):
        """``most`` places; addresses in ``exempt`` may take all. ``parts`` sets the share: see the
        module."""
        self.most = most
        self._exempt = exempt
        self._parts = parts
        self._taken = 0
        self._held: defaultdict[Hashable, int] = defaultdict(int)  # key: places
        self._lock = threading.Lock()  # guards both

    def enter(self, address: str) -> bool:
        """Take a place; False if the address has no share left."""
        key = counted_by(address)
        with self._lock:
            free, held = self.most - self._taken, self._held.get(key, 0)
            if free <= 0 or self._parts * held >= free and address not in self._exempt:
                return False
            self._taken += 1
            self._held[key] = held + 1
            return True

    def leave(self, address: str) -> None:
        """Give a place back."""
        with self._lock:
            self._taken -= 1
            _take_off(self._held, counted_by(address))

    @property
    def taken(self) -> int:
        with self._lock:
            return self._taken

    def crowded(self) -> bool:
        """Whether half of the places are taken: from then on slow visitors are cut."""
        return 2 * self._taken >= self.most


class Places:
    """Places for the connections of one port or several, a Seat each. Any thread."""

    def __init__(self, most: int, exempt: Addresses = (), parts: int = PARTS):
        """As for Shares. SILENT_PARTS additionally limits an address's connections that have not
        settled (Seat.settle()). With ``parts`` 0 its settled connections have no limit."""
        self.most = most
        self._exempt = exempt
        self._parts = parts
        self._taken = 0
        self._held: defaultdict[Hashable, int] = defaultdict(int)  # key: seats
        self._silent: defaultdict[Hashable, int] = defaultdict(int)  # those not settled
        self._lock = threading.Lock()  # guards these three, and the seats

    @property
    def taken(self) -> int:
        with self._lock:
            return self._taken

    def take(self, address: str) -> Seat | None:
        """A seat for a new connection; None if its address has no share left."""
        key = counted_by(address)
        with self._lock:
            if not self._fits(address, key, self.most - self._taken):
                return None
            self._taken += 1
            return Seat(self, key)

    def _fits(self, address: str, key: Hashable, free: int) -> bool:
        """Whether the address may have one of the ``free`` places. Caller holds the lock."""
        if free <= 0:
            return False
        silent, held = self._silent.get(key, 0), self._held.get(key, 0)
        fits = SILENT_PARTS * silent < free and self._parts * held < free
        return fits or address in self._exempt


class Seat:
    """One connection's place. Any thread."""

    __slots__ = ("_places", "_key", "_is_silent", "_is_taken")

    def __init__(self, places: Places, key: Hashable):
        """``key``: that of its address. Caller holds the lock of ``places``."""
        self._places = places
        self._key = key
        self._is_silent = self._is_taken = True
        places._held[key] += 1
        places._silent[key] += 1

    def move(self, address: str) -> bool:
        """Count the connection for ``address``, the visitor that a proxy has named. False if that
        address has no share left: the caller closes the connection."""
        places, key = self._places, counted_by(address)
        with places._lock:
            if not self._is_taken:
                return False
            self._uncount()
            fits = places._fits(address, key, places.most - places._taken + 1)
            self._key = key
            places._held[key] += 1
            places._silent[key] += self._is_silent
            return fits

    def settle(self) -> None:
        """Note that the peer has asked for something: SILENT_PARTS does not limit the connection
        any more."""
        if self._is_silent:
            with self._places._lock:
                if self._is_silent and self._is_taken:
                    _take_off(self._places._silent, self._key)
                self._is_silent = False

    def leave(self) -> None:
        """The connection is closed: free its place. A second call does nothing."""
        with self._places._lock:
            if self._is_taken:
                self._is_taken = False
                self._places._taken -= 1
                self._uncount()

    def _uncount(self) -> None:
        """Caller holds the lock."""
        _take_off(self._places._held, self._key)
        if self._is_silent:
            _take_off(self._places._silent, self._key)


def _take_off(counts: dict[Hashable, int], key: Hashable) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
