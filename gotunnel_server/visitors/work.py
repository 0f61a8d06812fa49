"""Limits the CPU time that a body of tiny pieces can cost.

A chunk of one byte costs as much as a chunk of a kilobyte. A peer that sends nothing else would
keep a CPU busy and, because of the interpreter's lock (GIL), slow every other visit. So a thread
that reads such a body sleeps when it is over its budget (GCRA, as in token_bucket.py).
"""

from time import monotonic, sleep


class Work:
    """The budget for one body. One thread at a time."""

    def __init__(self, rate: float, burst: float):
        """``rate`` units of work a second in the long run, ``burst`` units at once."""
        self._interval = 1 / rate
        self._patience = burst / rate
        self._paid_at = 0.0  # monotonic time at which ``rate`` has paid for all work so far

    def spend(self, units: float) -> None:
        """Count work that was done; sleep if that is over the budget."""
        if units > 0:
            now = monotonic()
            self._paid_at = max(self._paid_at, now - self._patience) + units * self._interval
            if self._paid_at > now:
                sleep(self._paid_at - now)
