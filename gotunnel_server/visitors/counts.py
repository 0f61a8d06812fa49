"""Counts visits by hostname, for the metrics and the dashboard."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic

from ..routes import Route
from .visit import MOST_HOSTNAMES, TCP, Visit

# The label for hostnames beyond MOST_HOSTNAMES, and for those that no agent serves, as any stranger
# can invent those.
OTHER = "other"
# Upper ends of the histogram's buckets, in seconds: from a small answer out of a cache to the
# default RESPONSE_TIMEOUT.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)
ROOM_EVERY = 60  # seconds between two searches for hostnames that can be forgotten
CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")


class Count:
    """The visits of one hostname. Read without a lock: each figure only grows."""

    __slots__ = ("http", "tcp", "failed", "received", "sent", "buckets", "seconds")

    def __init__(self) -> None:
        self.http = [0] * len(CLASSES)  # visits by class of their status
        self.tcp = [0] * len(CLASSES)
        self.failed = 0  # see Visit.failed
        self.received = self.sent = 0  # bytes of visitors, and to them
        self.buckets = [0] * (len(BOUNDS) + 1)  # of http visits, by their duration
        self.seconds = 0.0  # sum of their durations

    @property
    def visits(self) -> int:
        return sum(self.http) + sum(self.tcp)


class Counts:
    """A Subscriber of visits. Any thread."""

    def __init__(self, lookup: Callable[[str], Route | None]):
        """``lookup(hostname)``: its route, None if no agent serves it."""
        self.errors: Counter[str] = (
            Counter()
        )  # visits by Visit.error, whose words are the gateway's
        self._lookup = lookup
        self._lock = threading.Lock()  # guards all
        self._by_hostname: dict[str, Count] = {}
        self._other = Count()
        self._full_until = 0.0  # monotonic: a search found nothing to forget

    def __call__(self, visits: Sequence[Visit]) -> None:
        with self._lock:
            by_hostname = self._by_hostname
            for visit in visits:
                if visit.is_local:  # a dashboard that is open would count itself
                    continue
                route = visit.route or self._lookup(visit.hostname)
                count = self._other
                if route is not None:
                    count = by_hostname.get(route.hostname) or self._of(route.hostname)
                status = visit.status
                kind = status // 100 - 1 if 100 <= status < 600 else 4
                if visit.protocol == TCP:
                    count.tcp[kind] += 1
                else:
                    count.http[kind] += 1
                    # Those others last as they like.
                    if status != 101 and visit.method != "CONNECT":
                        duration = visit.duration
                        count.buckets[bisect_left(BOUNDS, duration)] += 1
                        count.seconds += duration
                count.received += visit.received
                count.sent += visit.sent
                if kind == 4 or visit.error:  # 4: 5xx
                    if visit.error:
                        self.errors[visit.error] += 1
                    count.failed += visit.failed

    def _of(self, hostname: str) -> Count:
        """The Count of a hostname that has none. Caller holds the lock."""
        if hostname == OTHER:
            return self._other
        if len(self._by_hostname) >= MOST_HOSTNAMES and not self._make_room():
            return self._other
        count = self._by_hostname[hostname] = Count()
        return count

    def _make_room(self) -> bool:
        """Forget a hostname that no agent serves any more; False if there is none."""
        if monotonic() < self._full_until:
            return False
        for hostname in self._by_hostname:
            if self._lookup(hostname) is None:
                del self._by_hostname[hostname]
                return True
        self._full_until = monotonic() + ROOM_EVERY
        return False

    def __getitem__(self, hostname: str) -> Count:
        """The visits of a hostname as its agent registered it. Those that are counted as OTHER are
        not among them."""
        with self._lock:
            return self._by_hostname.get(hostname) or Count()

    def all(self) -> dict[str, Count]:
        """By hostname, or OTHER."""
        with self._lock:
            return {**self._by_hostname, OTHER: self._other}
