"""Token buckets: so many at once, and in the long run so many a second, counted by key.

GCRA, the generic cell rate algorithm (ITU-T I.371, "virtual scheduling"): a bucket is one number,
the time at which it is full again. Taking a token puts that time off by 1 / rate seconds. A token
is there if the bucket would still be full again within burst / rate seconds.
"""

import heapq
from collections.abc import Hashable

MOST_KEYS = 4096  # that are remembered, about 200 bytes each


class Buckets:
    """A token bucket for each key, all of one rate and burst. Not for two threads at once.

    ``now`` is in seconds, by any clock; shift() says that it was set. A bucket that is full says
    nothing and may be forgotten.

    If there are too many that are not full, a newcomer takes the place of the one that is closest
    to it. So nobody is kept out by others; and to have an empty bucket forgotten takes ``most``
    others that were emptied as far, each under a key of its own.
    """

    def __init__(self, rate: float, burst: int, most: int = MOST_KEYS):
        """``rate`` is in tokens a second."""
        self._interval = 1 / rate
        # How far it may be from full and still give a token; times are rounded, so a thousandth
        # of a token may be missing.
        self._patience = (burst - 0.999) / rate
        self._most = most
        self._full_at = {}  # key: time
        # A heap of (time, number, key), one a key. The time may be an older one; it is put right
        # when it comes to the top.
        self._queue = []
        self._count = 0  # number of the next entry: keys need not compare

    def wait(self, key: Hashable, now: float) -> float:
        """Seconds until there is a token; 0 if there is one."""
        return max(0, self._full_at.get(key, now) - now - self._patience)

    def take(self, key: Hashable, now: float):
        """Take a token, whether there is one or not."""
        full_at = self._full_at.get(key)
        if full_at is None:
            self._make_room(now)
            full_at = now
            heapq.heappush(self._queue, (now + self._interval, self._count, key))
            self._count += 1
        self._full_at[key] = max(full_at, now) + self._interval

    def give_back(self, key: Hashable):
        """Undo a take()."""
        if key in self._full_at:
            self._full_at[key] -= self._interval

    def shift(self, seconds: float):
        """The clock was set forward by so many seconds, back if they are negative. Each bucket
        holds what it held."""
        self._full_at = {key: full_at + seconds for key, full_at in self._full_at.items()}
        self._queue = [(noted_at + seconds, *entry) for noted_at, *entry in self._queue]

    def _make_room(self, now):
        """Forget two that are full, if there are such, so that the table shrinks after a crowd;
        and one that is not, if there is no room else."""
        forgotten = 0
        while self._queue:
            noted_at, number, key = self._queue[0]
            full_at = self._full_at[key]
            if noted_at < full_at:  # tokens were taken since: it goes back to its place
                heapq.heapreplace(self._queue, (full_at, number, key))
            elif forgotten < 2 and full_at <= now or len(self._full_at) >= self._most:
                heapq.heappop(self._queue)
                del self._full_at[key]
                forgotten += 1
            else:
                return
