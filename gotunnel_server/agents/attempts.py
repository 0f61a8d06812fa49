"""Failed attempts to register, counted by address: at first free, then slow, then not at all.

What an address may do in a minute that begins with its first failure:

    failures            what happens
    1 to 10             refused at once
    11 to 120           refused after a delay, 0.25 s more each time, at most 5 s
    more                its connections are dropped until the minute is over

Only refusals are delayed: a good token gets in at once, also from an address that is slow. That is
for the agents behind one NAT, of which one has a wrong secret. A Go agent with a wrong secret comes
back every 2 s, so 30 times a minute, and less often once it waits for its refusals: it makes its
address slow and never closes it, and it takes a dozen of them together to do that. Nobody's success
clears the count either; it ends with its minute.

An IPv6 address counts with its /64, which is what one subscriber has.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from time import monotonic

from gotunnel_agent.common import addresses

MINUTE = 60  # seconds that failures are counted together
FREE_FAILURES = 10  # a mistyped secret, tried a few times
DELAY_STEP = 0.25  # seconds that each further failure adds
MOST_DELAY = 5.0  # seconds; a registration has 10 (newcomer.py), and agents wait longer
MOST_FAILURES = 120  # four times what a Go agent makes that nobody slows down
# Addresses that are remembered, some 200 bytes each. When there are more, the one with the fewest
# failures is forgotten: whoever wants to be forgotten needs as many addresses with more each.
MOST_ADDRESSES = 4096


class Attempts:
    """The failures of the last minute. Any thread; addresses are IP addresses as text."""

    def __init__(self, now=monotonic):
        """``now()`` gives monotonic seconds."""
        self._now = now
        self._counts = OrderedDict()  # key: [monotonic end of its minute, failures]; oldest first
        self._lock = threading.Lock()  # guards _counts

    def failed(self, address: str):
        """An attempt from there has failed."""
        key, now = _key(address), self._now()
        with self._lock:
            self._forget_old(now)
            if key in self._counts:
                self._counts[key][1] += 1
                return
            if len(self._counts) >= MOST_ADDRESSES:
                del self._counts[self._coldest()]
            self._counts[key] = [now + MINUTE, 1]

    def delay(self, address: str) -> float:
        """Seconds to wait before a refusal is sent there, after failed()."""
        excess = max(self._failures(address) - FREE_FAILURES, 0)
        return min(excess * DELAY_STEP, MOST_DELAY)

    def closed(self, address: str) -> bool:
        """Whether connections from there are dropped for now."""
        return self._failures(address) > MOST_FAILURES

    def _failures(self, address):
        key, now = _key(address), self._now()
        with self._lock:
            self._forget_old(now)
            return self._counts[key][1] if key in self._counts else 0

    def _coldest(self):
        """The address with the fewest failures. Caller holds the lock."""
        for key, (_, failures) in self._counts.items():
            if failures == 1:  # there are no fewer: the first will do, and is soon found
                return key
        return min(self._counts, key=lambda key: self._counts[key][1])

    def _forget_old(self, now):
        """Caller holds the lock."""
        while self._counts and next(iter(self._counts.values()))[0] <= now:
            self._counts.popitem(last=False)


def _key(address):
    """What an address is counted by."""
    found = addresses.parse(address)
    # A text that is no address does not come from accept(), and is as good a key.
    return address if found is None else addresses.subscriber(found)
