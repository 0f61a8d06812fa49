"""Failed attempts to register, counted by address: first free, then slow, then few are looked at.

What an address may do in a minute that begins with its first failure:

    failures            what happens
    1 to 10             refused at once
    11 to 120           refused after a delay, 0.25 s more each time, at most 5 s
    more                the address is closed: of its connections only so many a second get to TLS
                        (OPENINGS), and of their tokens only so many are looked at (CHECKS)

Only refusals are delayed: a good token gets in at once, also from an address that is slow. That is
for the agents behind one NAT, of which one has a wrong secret, and for those behind a load balancer
or in a container network, where strangers have their address, too. So nor is a good token lost at
an address that is closed: an agent whose token was good before is looked at in any case, by its
instance, and any other one as often as it takes its turn among the strangers. A Go agent with a
wrong secret comes back every 2 s, so 30 times a minute, and less often once it waits for its
refusals: it makes its address slow and never closes it, and it takes a dozen of them together to do
that. Nobody's success clears the count either; it ends with its minute.

An IPv6 address counts with its /64, which is what one subscriber has.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from time import monotonic

from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.token_bucket import Buckets

MINUTE = 60  # seconds that failures are counted together
FREE_FAILURES = 10  # a mistyped secret, tried a few times
DELAY_STEP = 0.25  # seconds that each further failure adds
MOST_DELAY = 5.0  # seconds; a registration has 10 (newcomer.py), and agents wait longer
MOST_FAILURES = 120  # four times what a Go agent makes that nobody slows down
# Of an address that is closed. Handshakes a second, which take a tenth of a CPU; then tokens that
# are looked at, which bounds how many secrets can be tried: Go agents are in after some tries of
# 2 s each, unless strangers come a hundred times a second from the same address.
OPENINGS_A_SECOND, OPENINGS = 50, 50
CHECKS_A_SECOND, CHECKS = 10, 20
# Instances whose last token was good; of more, those that came last. Some 200 bytes each.
MOST_KNOWN = 4096
# Addresses that are remembered, some 200 bytes each. When there are more, the one with the fewest
# failures is forgotten: to have its own forgotten, an attacker needs as many others with more each.
MOST_ADDRESSES = 4096


class Attempts:
    """The failures of the last minute. Any thread; addresses are IP addresses as text."""

    def __init__(self, now=monotonic):
        """``now()`` gives monotonic seconds."""
        self._now = now
        self._counts = OrderedDict()  # key: [monotonic end of its minute, failures]; oldest first
        self._openings = Buckets(OPENINGS_A_SECOND, OPENINGS)  # by key, as are these:
        self._checks = Buckets(CHECKS_A_SECOND, CHECKS)
        self._known = OrderedDict()  # instances: None; the latest last
        self._lock = threading.Lock()  # guards these four

    def failed(self, address: str, instance: str = "") -> str:
        """An attempt from there has failed, of an agent with that instance. Returns what changes by
        it for the address, for the log; "" if nothing does."""
        key, now = counted_by(address), self._now()
        with self._lock:
            self._known.pop(instance, None)
            self._forget_old(now)
            if key not in self._counts:
                if len(self._counts) >= MOST_ADDRESSES:
                    del self._counts[self._coldest()]
                self._counts[key] = [now + MINUTE, 0]
            self._counts[key][1] += 1
            failures = self._counts[key][1]
        if failures == FREE_FAILURES + 1:
            return f"{failures} bad tokens came in a minute: further refusals are slow"
        if failures == MOST_FAILURES + 1:
            return (
                f"{failures} bad tokens came in a minute: for now {CHECKS_A_SECOND} a second are "
                "looked at, and those of agents that were registered before; if it is a proxy, "
                "TRUSTED_PROXIES and the PROXY protocol tell its agents apart"
            )
        return ""

    def proved(self, instance: str):
        """An agent with that instance has shown a good token."""
        if not instance:
            return
        with self._lock:
            self._known[instance] = None
            self._known.move_to_end(instance)
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)

    def delay(self, address: str) -> float:
        """Seconds to wait before a refusal is sent there, after failed()."""
        excess = max(self._failures(address) - FREE_FAILURES, 0)
        return min(excess * DELAY_STEP, MOST_DELAY)

    def closed(self, address: str) -> bool:
        """Whether only some of its connections and tokens are looked at for now."""
        return self._failures(address) > MOST_FAILURES

    def may_open(self, address: str) -> bool:
        """Whether a new connection from there gets to TLS."""
        return not self.closed(address) or self._take(self._openings, address)

    def may_show(self, address: str, instance: str) -> bool:
        """Whether the token of an agent with that instance is looked at."""
        if not self.closed(address):
            return True
        with self._lock:
            if instance in self._known:
                return True
        return self._take(self._checks, address)

    def _take(self, buckets, address):
        key, now = counted_by(address), self._now()
        with self._lock:
            free = not buckets.wait(key, now)
            if free:
                buckets.take(key, now)
            return free

    def _failures(self, address):
        key, now = counted_by(address), self._now()
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
