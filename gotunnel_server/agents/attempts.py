"""Slows down the guessing of tokens: failed registrations are counted by address.

What happens in a minute that begins with an address's first failure:

    failures            what happens
    1 to 10             refused at once
    11 to 120           refused after a delay, 0.25 s more each time, at most 5 s
    more                the address is *closed*: of its connections only OPENINGS_A_SECOND get to
                        TLS, and of their tokens only CHECKS_A_SECOND are checked

Only refusals are delayed. A good token gets in at once, also from a slow address: several agents
may be behind one NAT, one of them with a wrong secret; and behind a load balancer or in a container
network strangers have the agents' address. For their sake a closed address does not lock out good
tokens either. The token of an agent that was registered before, which its instance shows, is always
checked; other agents compete with the strangers for the checks.

A Go agent with a wrong secret comes back every 2 s, 30 times a minute, and less often once it waits
for its refusals. So it makes its address slow, but cannot close it; a dozen of them together can. A
success does not clear the count, which ends with its minute.

An IPv6 address counts by its /64, the smallest block that a subscriber gets.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from time import monotonic

from gotunnel_agent.common.addresses import counted_by
from gotunnel_agent.common.token_bucket import Buckets

MINUTE = 60  # seconds for which failures are counted
FREE_FAILURES = 10  # enough for a mistyped secret, tried a few times
DELAY_STEP = 0.25  # seconds that each further failure adds
MOST_DELAY = 5.0  # seconds; a registration has 10 (newcomer.py), and agents wait longer
MOST_FAILURES = 120  # four times what a Go agent makes without delays
# Handshakes of a closed address, a second and at once: 50 take a tenth of a CPU.
OPENINGS_A_SECOND, OPENINGS = 50, 50
# Checked tokens of a closed address, a second and at once. They bound how many secrets an attacker
# can try. A Go agent is in after a few tries of 2 s each, unless strangers come a hundred times a
# second from its address.
CHECKS_A_SECOND, CHECKS = 10, 20
# Remembered instances whose last token was good, the latest ones. Some 200 bytes each.
MOST_KNOWN = 4096
# Remembered addresses, some 200 bytes each. Beyond it the one with the fewest failures is
# forgotten. To have its own address forgotten, an attacker needs so many others with more failures.
MOST_ADDRESSES = 4096


class Attempts:
    """The failures of the last minute. Any thread. Addresses are IP addresses as text; their key is
    addresses.counted_by()."""

    def __init__(self, now: Callable[[], float] = monotonic):
        """``now()`` gives monotonic seconds."""
        self._now = now
        # Key: (monotonic end of its minute, failures); the oldest first.
        self._counts: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()
        self._openings = Buckets(OPENINGS_A_SECOND, OPENINGS)  # by key
        self._checks = Buckets(CHECKS_A_SECOND, CHECKS)  # by key
        self._known: OrderedDict[str, None] = OrderedDict()  # instances; the latest last
        self._spent: dict[Hashable, int] | None = None  # by key: see spent()
        self._lock = threading.Lock()  # guards these five

    def failed(self, address: str, instance: str = "") -> str:
        """Count a failure of an agent with that instance. Returns a line for the log if the address
        is slowed or closed by it, else ""."""
        key = counted_by(address)
        with self._lock:
            self._known.pop(instance, None)
            failures = self._count(key, 1)
            if self._spent is not None and (key in self._spent or len(self._spent) < MOST_KNOWN):
                self._spent[key] = self._spent.get(key, 0) + 1
        if failures == FREE_FAILURES + 1:
            return f"{failures} bad tokens came in a minute: further refusals are delayed"
        if failures == MOST_FAILURES + 1:
            return (
                f"{failures} bad tokens came in a minute: until it is over, {CHECKS_A_SECOND} of "
                "its tokens a second are checked, beside those of agents that were registered "
                "before; if the address is a proxy, name it in TRUSTED_PROXIES and have it send "
                "the PROXY protocol"
            )
        return ""

    def _count(self, key: Hashable, more: int) -> int:
        """Its failures now. Caller holds the lock."""
        now = self._now()
        self._forget_old(now)
        if key not in self._counts:
            if len(self._counts) >= MOST_ADDRESSES:
                del self._counts[self._fewest_failures()]
            self._counts[key] = (now + MINUTE, 0)
        ends, failures = self._counts[key]
        self._counts[key] = (ends, failures + more)
        return failures + more

    # Several gateways whose failures count together (cluster/counts.py)

    def spent(self) -> dict[Hashable, int]:
        """By address, the failures here since the last call; the first call begins to count."""
        with self._lock:
            found, self._spent = self._spent, {}
            return found or {}

    def hear(self, key: Hashable, failures: int) -> None:
        """So many came at another gateway. ``key`` is as addresses.counted_by() makes it."""
        with self._lock:
            self._count(key, min(failures, MOST_FAILURES + 1))

    def proved(self, instance: str) -> None:
        """The token of an agent with that instance was good."""
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
        """Whether only some of its connections and tokens get a chance for now."""
        return self._failures(address) > MOST_FAILURES

    def may_open(self, address: str) -> bool:
        """Whether a new connection from there gets to TLS."""
        return not self.closed(address) or self._take(self._openings, address)

    def may_check(self, address: str, instance: str) -> bool:
        """Whether the token of an agent with that instance is checked."""
        if not self.closed(address):
            return True
        with self._lock:
            if instance in self._known:
                return True
        return self._take(self._checks, address)

    def _take(self, buckets: Buckets, address: str) -> bool:
        key, now = counted_by(address), self._now()
        with self._lock:
            free = not buckets.wait(key, now)
            if free:
                buckets.take(key, now)
            return free

    def _failures(self, address: str) -> int:
        key, now = counted_by(address), self._now()
        with self._lock:
            self._forget_old(now)
            return self._counts[key][1] if key in self._counts else 0

    def _fewest_failures(self) -> Hashable:
        """The key with the fewest failures. Caller holds the lock."""
        for key, (_, failures) in self._counts.items():
            if failures == 1:  # the minimum: no need to look on
                return key
        return min(self._counts, key=lambda key: self._counts[key][1])

    def _forget_old(self, now: float) -> None:
        """Caller holds the lock."""
        while self._counts and next(iter(self._counts.values()))[0] <= now:
            self._counts.popitem(last=False)
