"""Places for so many at a time, of which one address has a part: nobody takes them all.

Whatever an address can hold is counted here: connections (``Places``, net/listener.py), requests
and relays (``Shares``, visitors/port.py). An IPv6 address counts by its /64, which one subscriber
has (addresses.counted_by).

A share falls with what is left: an address may take another place while what it holds is less than
a part of the places that are free. With 2 *parts* one address alone gets a third, the next one a
third of the rest, and so on: five leave 13 % of all, ten still leave 2 %. An address that holds
nothing gets a place as long as there is one. A trusted proxy stands for many visitors and is
exempt; once it has named a visitor, that one's address counts.
"""

import threading
from collections import Counter

from gotunnel_agent.common.addresses import counted_by

# An address alone gets 1/3: an office behind one address, or a browser at a small gateway, is not
# cut; and the rest serves everybody else.
PARTS = 2
# Of connections that have not said yet what they want an address alone gets 1/8. Each is so for
# some 0.1 s, a spare one of a browser for 10 s; so this is far more than an honest address has,
# and after five addresses that flood half of the places are free.
SILENT_PARTS = 7


class Shares:
    """Places of which each address has a share. Any thread."""

    def __init__(self, most, exempt=(), parts=PARTS):
        """``most`` places; addresses in ``exempt`` may take all. ``parts`` sets the share: see
        above."""
        self.most = most
        self._exempt = exempt
        self._parts = parts
        self._taken = 0
        self._held = Counter()  # key: places
        self._lock = threading.Lock()  # guards both

    def enter(self, address: str) -> bool:
        """Take a place, if there is one for that address."""
        key = counted_by(address)
        with self._lock:
            free = self.most - self._taken
            if free <= 0:
                return False
            if self._parts * self._held[key] >= free and address not in self._exempt:
                return False
            self._taken += 1
            self._held[key] += 1
            return True

    def leave(self, address: str):
        with self._lock:
            self._taken -= 1
            _take_off(self._held, counted_by(address))

    def crowded(self) -> bool:
        """Whether half of the places are taken: then slow ones are asked to make room."""
        return 2 * self._taken >= self.most


class Places:
    """Places for the connections of one port or several, a Seat each. Any thread."""

    def __init__(self, most, exempt=(), parts=PARTS):
        """As for Shares. A connection that is not settled has a share by SILENT_PARTS, too; with 0
        ``parts`` it is the only one."""
        self.most = most
        self._exempt = exempt
        self._parts = parts
        self._taken = 0
        self._held = Counter()  # key: seats
        self._silent = Counter()  # key: of them, those that are not settled
        self._lock = threading.Lock()  # guards these three, and the seats

    @property
    def taken(self) -> int:
        with self._lock:
            return self._taken

    def take(self, address: str) -> "Seat | None":
        """A seat for a new connection, None if there is none for its address."""
        with self._lock:
            if not self._fits(address, counted_by(address), self.most - self._taken):
                return None
            self._taken += 1
            return Seat(self, address)

    def _fits(self, address, key, free):
        if free <= 0:
            return False
        fits = SILENT_PARTS * self._silent[key] < free and self._parts * self._held[key] < free
        return fits or address in self._exempt


class Seat:
    """One connection's place."""

    __slots__ = ("_places", "_key", "_is_silent", "_is_taken")

    def __init__(self, places, address):
        """Caller holds the lock of ``places``."""
        self._places = places
        self._key = counted_by(address)
        self._is_silent = self._is_taken = True
        places._held[self._key] += 1
        places._silent[self._key] += 1

    def move(self, address: str) -> bool:
        """The connection is that of ``address``, a proxy says. False if that one has no share left;
        then the connection is to be closed."""
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

    def settle(self):
        """The connection has said what it wants, and other limits bound it from here on."""
        if self._is_silent:
            with self._places._lock:
                if self._is_silent and self._is_taken:
                    _take_off(self._places._silent, self._key)
                self._is_silent = False

    def leave(self):
        """The connection is closed: there is room for another. A second time does nothing."""
        with self._places._lock:
            if self._is_taken:
                self._is_taken = False
                self._places._taken -= 1
                self._uncount()

    def _uncount(self):
        """Caller holds the lock."""
        _take_off(self._places._held, self._key)
        if self._is_silent:
            _take_off(self._places._silent, self._key)


def _take_off(counts, key):
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
