"""Token buckets, one for each key: a burst of requests at once, and a rate in the long run.

The algorithm is GCRA, the generic cell rate algorithm (ITU-T I.371, "virtual scheduling"): a bucket
is one number, the time at which it will be full again. Taking a token moves that time by 1 / rate
seconds. A request is allowed if the bucket would be full again within burst / rate seconds.
"""

import heapq
from collections.abc import Hashable

# Seconds. Buckets that count as one may each have given a whole burst before they heard of each
# other; with many of them, that would be a long debt.
MOST_DEBT = 60.0
MOST_KEYS = 4096  # keys that are remembered, about 200 bytes each


class Buckets:
    """A token bucket for each key, all of one rate and burst. Not thread-safe: the caller locks.

    ``now`` is in seconds, by any clock. When a wall clock was set, call shift(), or the buckets
    would fill too early or too late. A full bucket is like a new one, so it may be forgotten.

    If ``most`` buckets are not full, a new key replaces the key whose bucket is closest to full. So
    a new key always gets a bucket. To make us forget an empty bucket, an attacker would have to
    empty the buckets of ``most`` other keys.
    """

    def __init__(self, rate: float, burst: int, most: int = MOST_KEYS):
        """``rate`` is in tokens a second."""
        self._interval = 1 / rate
        # GCRA's tolerance: seconds that a bucket may need to be full and still give a token. As
        # times are rounded, a thousandth of a token may be missing.
        self._tolerance = (burst - 0.999) / rate
        self._most = most
        self._full_at: dict[Hashable, float] = {}
        # Heap of (time, number, key), one entry for each key. The time may be outdated; it is
        # corrected when the entry reaches the top.
        self._queue: list[tuple[float, int, Hashable]] = []
        self._count = 0  # number of the next entry, so that keys are never compared
        # By key, the tokens taken since the last spent(); None: nobody asks for them.
        self._spent: dict[Hashable, int] | None = None

    def wait(self, key: Hashable, now: float) -> float:
        """Seconds until there is a token; 0 if there is one now."""
        return max(0, self._full_at.get(key, now) - now - self._tolerance)

    def take(self, key: Hashable, now: float) -> None:
        """Take a token, whether there is one or not."""
        full_at = self._full_at.get(key)
        if full_at is None:
            self._make_room(now)
            full_at = now
            heapq.heappush(self._queue, (now + self._interval, self._count, key))
            self._count += 1
        self._full_at[key] = max(full_at, now) + self._interval
        if self._spent is not None and (key in self._spent or len(self._spent) < self._most):
            self._spent[key] = self._spent.get(key, 0) + 1

    def spent(self) -> dict[Hashable, int]:
        """By key, the tokens taken since the last call; the first call begins to count."""
        found, self._spent = self._spent, {}
        return found or {}

    def hear(self, key: Hashable, tokens: int, now: float) -> None:
        """``tokens`` were taken elsewhere, from other Buckets that count as one with these. The
        bucket may go into debt, and then gives no token until that is paid off; at most MOST_DEBT
        seconds later."""
        counted, self._spent = self._spent, None
        self.take(key, now)
        self._spent = counted
        most = now + self._tolerance + MOST_DEBT
        full_at = self._full_at[key] + (tokens - 1) * self._interval
        self._full_at[key] = min(full_at, max(most, self._full_at[key]))

    def give_back(self, key: Hashable) -> None:
        """Undo a take()."""
        if key in self._full_at:
            self._full_at[key] -= self._interval

    def shift(self, seconds: float) -> None:
        """Keep what each bucket holds although the clock was set forward by ``seconds`` (back if
        negative)."""
        self._full_at = {key: full_at + seconds for key, full_at in self._full_at.items()}
        self._queue = [(noted_at + seconds, number, key) for noted_at, number, key in self._queue]

    def _make_room(self, now: float) -> None:
        """Forget up to two full buckets, so that the table shrinks after a crowd; if there is no
        room then, also the one that is closest to full."""
        forgotten = 0
        while self._queue:
            noted_at, number, key = self._queue[0]
            full_at = self._full_at[key]
            if noted_at < full_at:  # outdated: tokens were taken since
                heapq.heapreplace(self._queue, (full_at, number, key))
            elif forgotten < 2 and full_at <= now or len(self._full_at) >= self._most:
                heapq.heappop(self._queue)
                del self._full_at[key]
                forgotten += 1
            else:
                return
