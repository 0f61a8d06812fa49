"""A budget for the work that tiny pieces of a body make.

A chunk of one byte costs as much as one of a kilobyte. A peer that sends nothing else would hold a
CPU, and through the interpreter's lock slow every other visit. So the thread that reads such a body
sleeps once it has worked more than its budget gives (GCRA, as in token_bucket.py).
"""

from time import monotonic, sleep


class Work:
    """Not for two threads at once."""

    def __init__(self, rate: float, burst: float):
        """``rate`` units of work a second in the long run, ``burst`` of them at once."""
        self._interval = 1 / rate
        self._patience = burst / rate
        self._paid_at = 0.0  # monotonic, when all work so far is within the rate

    def spend(self, units: float):
        """Count work that was done; sleep if it was more than the budget gives."""
        if units > 0:
            now = monotonic()
            self._paid_at = max(self._paid_at, now - self._patience) + units * self._interval
            if self._paid_at > now:
                sleep(self._paid_at - now)
