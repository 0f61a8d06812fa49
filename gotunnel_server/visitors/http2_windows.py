"""Flow control windows of what visitors send: how much of the bodies may wait in memory.

A window begins small. It doubles while the exchange keeps up with the visitor, so that a far one
gets its full rate, and is bounded for a body, for a connection and for the gateway.
"""

import threading

# Bytes that the windows of a body, and of all bodies of a connection, grow to.
MOST_WINDOW, MOST_WINDOW_ALL = 2 * 1024 * 1024, 8 * 1024 * 1024
# Bytes by which all windows of the gateway together may have grown.
MOST_GROWTH = 128 * 1024 * 1024
# A window doubles if half of it was used within so many seconds. So it fits a round trip of twice
# that time; a slow line keeps a small one.
GROW_WITHIN = 0.1


class Growth:
    """The bytes by which the windows of all connections together have grown. Any thread."""

    def __init__(self, most: int = MOST_GROWTH):
        self._free = most
        self._lock = threading.Lock()  # guards _free

    def take(self, size: int) -> bool:
        """Grow by ``size`` bytes; False if that is too much."""
        with self._lock:
            if size > self._free:
                return False
            self._free -= size
            return True

    def give_back(self, size: int) -> None:
        """The window is not used any more."""
        with self._lock:
            self._free += size


class Window:
    """The window of one body, or of a connection. The connection's lock guards it."""

    __slots__ = ("size", "_start", "_most", "_growth", "_owed", "_granted_at")

    def __init__(self, start: int, most: int, growth: Growth):
        self.size = start
        self._start, self._most, self._growth = start, most, growth
        self._owed = 0  # bytes that were read and are not granted again yet
        self._granted_at = 0.0

    def consumed(self, size: int, kept_up: bool, now: float) -> int:
        """``size`` bytes were read; ``kept_up``: no more are here. Returns how many to grant."""
        self._owed += size
        if 2 * self._owed < self.size:
            return 0
        granted, self._owed = self._owed, 0
        if kept_up and now - self._granted_at < GROW_WITHIN and 2 * self.size <= self._most:
            if self._growth.take(self.size):
                granted += self.size
                self.size *= 2
        self._granted_at = now
        return granted

    def end(self) -> None:
        """It is not used any more."""
        if self.size > self._start:
            self._growth.give_back(self.size - self._start)
            self.size = self._start
